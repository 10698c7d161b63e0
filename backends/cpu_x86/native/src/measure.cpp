// What this machine does in practice: multiply-add rate, attention rate per instruction set and dtype, read bandwidth.
// Every result is the best of several short runs: other processes can only make a run slower.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "plan.hpp"

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool bad_threads(int32_t threads, thal_parallel parallel) { return threads < 1 || (threads > 1 && !parallel); }

bool on_threads(int32_t threads, thal_parallel parallel, void* user, thal_task task, void* ctx) {
  if (threads > 1) return parallel(threads, task, ctx, user) == 0;
  task(0, ctx);
  return true;
}

struct FmaRun {
  const thal::Isa* isa;
  std::atomic<int64_t> flops;
};

struct ReadRun {
  const uint64_t* data;
  int64_t words, threads;
  std::atomic<uint64_t> total;
};

// Eight sums, so that the additions never wait for each other; compilers turn this into vector loads.
void read_range(int64_t i, void* ctx) {
  ReadRun& run = *static_cast<ReadRun*>(ctx);
  const int64_t each = run.words / run.threads / 8 * 8;
  const uint64_t* p = run.data + i * each;
  uint64_t sums[8] = {};
  for (int64_t j = 0; j < each; j += 8)
    for (int k = 0; k < 8; ++k) sums[k] += p[j + k];
  run.total.fetch_add(sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7]);
}

// Small pseudo-random inputs; the pattern holds for every dtype because a short exponent range is the same in all.
void fill(std::vector<char>& bytes, int32_t dtype) {
  uint32_t state = 12345;
  const auto size = static_cast<size_t>(thal::bytes_of(dtype));
  for (size_t i = 0; i + size <= bytes.size(); i += size) {
    state = state * 1664525u + 1013904223u;
    const uint32_t sign = state >> 31, mantissa = state >> 8 & 0x3f;
    const uint32_t word = sign << 31 | 126u << 23 | mantissa << 17;
    if (dtype == THAL_F64) {
      float narrow;
      std::memcpy(&narrow, &word, 4);
      const double wide = narrow;
      std::memcpy(&bytes[i], &wide, 8);
    } else if (dtype == THAL_F32) {
      std::memcpy(&bytes[i], &word, 4);
    } else {
      const uint16_t half = static_cast<uint16_t>(dtype == THAL_BF16 ? sign << 15 | 126u << 7 | mantissa
                                                                    : sign << 15 | 14u << 10 | mantissa << 4);
      std::memcpy(&bytes[i], &half, 2);
    }
  }
}

// One head of 128 query rows against 480 keys of 64: 0.5 MB in float32.
thal_attention sample(int32_t isa, int32_t dtype) {
  thal_attention c = {};
  c.struct_size = sizeof(c);
  c.dtype = dtype, c.isa = isa, c.num_threads = 1, c.scale = 0.125;
  c.B = c.Hq = c.Hkv = 1, c.L = 128, c.S = 480, c.E = c.Ev = 64;
  const int64_t stride[4] = {0, 0, 64, 1};
  std::copy(stride, stride + 4, c.q_stride);
  std::copy(stride, stride + 4, c.k_stride);
  std::copy(stride, stride + 4, c.v_stride);
  std::copy(stride, stride + 4, c.out_stride);
  return c;
}

double attention_rate(int32_t isa, int32_t dtype, int32_t repeats) {
  thal_attention c = sample(isa, dtype);
  const int64_t needed = thal_attention_workspace(&c);
  if (needed < 0) return static_cast<double>(needed);
  const int64_t size = thal::bytes_of(dtype);
  std::vector<char> q(static_cast<size_t>(c.L * 64 * size)), k(static_cast<size_t>(c.S * 64 * size)), v(k), out(q);
  std::vector<char> workspace(static_cast<size_t>(needed));
  fill(q, dtype), fill(k, dtype), fill(v, dtype);
  c.q = q.data(), c.k = k.data(), c.v = v.data(), c.out = out.data();
  c.workspace = workspace.data(), c.workspace_size = needed;
  double best = 1e30;
  for (int32_t i = 0; i < repeats + 2; ++i) {
    const double start = seconds();
    for (int j = 0; j < 4; ++j)
      if (const int code = thal_attention_run(&c)) return -code;
    best = std::min(best, seconds() - start);
  }
  return 4.0 * 4.0 * static_cast<double>(c.L * c.S * c.E) / best * 1e-9;
}

}  // namespace

extern "C" double thal_measure_fma(int32_t isa, int32_t repeats, int32_t num_threads, thal_parallel parallel, void* user) {
  const thal::Isa* found = thal::find_isa(isa);
  if (!found) return -THAL_BAD_ISA;
  if (bad_threads(num_threads, parallel)) return -THAL_BAD_THREADS;
  double best = 0.0;
  for (int32_t i = 0; i < repeats + 1; ++i) {
    FmaRun run{found, {0}};
    const auto task = [](int64_t, void* ctx) {
      FmaRun& r = *static_cast<FmaRun*>(ctx);
      r.flops.fetch_add(static_cast<int64_t>(r.isa->fma_flops(40000)));
    };
    const double start = seconds();
    if (!on_threads(num_threads, parallel, user, task, &run)) return -THAL_PARALLEL_FAILED;
    best = std::max(best, static_cast<double>(run.flops.load()) / (seconds() - start) * 1e-9);
  }
  return best;
}

extern "C" double thal_measure_attention(int32_t isa, int32_t dtype, int32_t repeats) {
  if (dtype < 0 || dtype >= THAL_DTYPES) return -THAL_BAD_DTYPE;
  try {
    return attention_rate(isa, dtype, repeats);
  } catch (const std::bad_alloc&) {
    return -THAL_NO_MEMORY;
  }
}

extern "C" double thal_measure_bandwidth(int64_t bytes, int32_t repeats, int32_t num_threads, thal_parallel parallel,
                                         void* user) {
  if (bad_threads(num_threads, parallel)) return -THAL_BAD_THREADS;
  if (bytes < 64 * static_cast<int64_t>(num_threads)) return -THAL_BAD_SIZE;
  void* memory = std::malloc(static_cast<size_t>(bytes));
  if (!memory) return -THAL_NO_MEMORY;
  std::memset(memory, 1, static_cast<size_t>(bytes));  // untouched pages would all be one page of zeros
  double best = 0.0;
  for (int32_t i = 0; i < repeats + 1; ++i) {
    ReadRun run{static_cast<const uint64_t*>(memory), bytes / 8, num_threads, {0}};
    const double start = seconds();
    const bool ok = on_threads(num_threads, parallel, user, read_range, &run);
    const double took = seconds() - start;
    if (!ok || run.total.load() == 0) {
      std::free(memory);
      return -THAL_PARALLEL_FAILED;
    }
    best = std::max(best, static_cast<double>(run.words / num_threads / 8 * 64 * num_threads) / took * 1e-9);
  }
  std::free(memory);
  return best;
}
