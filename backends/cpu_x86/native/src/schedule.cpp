// Runs a planned call: items are handed out by an atomic counter, then the partial results of split calls are merged.
// Which thread runs an item never changes what the item computes, and partial results are merged in a fixed order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "plan.hpp"

namespace thal {
namespace {

// Below this many multiply-adds (about 10 us on one core) waking other threads costs more than it brings.
constexpr double kSerialWork = 5e5;

struct Run {
  const Plan& plan;
  const Isa& isa;
  std::atomic<int64_t> next;
  int64_t count;
  void (*step)(Run&, int64_t i, char* scratch);
};

void run_item(Run& run, int64_t i, char* scratch) {
  const Item it = item_at(run.plan, i);
  const Plan& p = run.plan;
  // Tiles are of float32 where keys and values are dequantised before the products.
  const auto kernel = p.row_kernel ? run.isa.run_rows[p.stored_type]
                                   : run.isa.run_tile[p.call.quantized ? THAL_F32 : p.call.dtype];
  kernel(p, it, scratch);
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x38800000) {  // subnormal: adding 2^-1 puts the rounding where the last half-precision bit is
    float y;
    std::memcpy(&y, &size, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  const uint32_t rounded = size + 0xfff + (size >> 13 & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | rounded >> 13);
}

void store(int32_t dtype, void* base, int64_t at, float x) {
  if (dtype == THAL_F32) static_cast<float*>(base)[at] = x;
  if (dtype == THAL_BF16) static_cast<uint16_t*>(base)[at] = to_bf16(x);
  if (dtype == THAL_F16) static_cast<uint16_t*>(base)[at] = to_f16(x);
}

// Row i of a tile, from its first split on; `sums` has room for Ev floats.
void merge_row(const Plan& p, int64_t i, const Item& it, float* sums) {
  const thal_attention& c = p.call;
  constexpr float inf = std::numeric_limits<float>::infinity();
  const int64_t splits = it.sequence.splits;
  const auto partial = [&](int64_t s) { return it.partial + s * p.partial_floats; };
  const auto state = [&](int64_t s) { return partial(s) + p.tile_rows * c.Ev; };
  float top = -inf;
  for (int64_t s = 0; s < splits; ++s) top = std::max(top, state(s)[i]);
  const float safe = top == -inf ? 0.0f : top;
  std::fill(sums, sums + c.Ev, 0.0f);
  float total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) {
    const float weight = std::exp2((state(s)[i] - safe) * p.exp_factor), sum = state(s)[p.tile_rows + i];
    if (sum == 0.0f) continue;  // no live key in this range
    total += weight * sum;
    const float* o = partial(s) + i * c.Ev;
    for (int64_t e = 0; e < c.Ev; ++e) sums[e] += weight * o[e];
  }
  const int64_t row = it.row0 + i, l = row / p.group, h = it.kv_head * p.group + row % p.group;
  const float inverse = total == 0.0f ? 0.0f : p.kept() / total;
  const int64_t at = it.sequence.out + h * c.out_stride[1] + l * c.out_stride[2];
  for (int64_t e = 0; e < c.Ev; ++e) store(c.dtype, c.out, at + e * c.out_stride[3], sums[e] * inverse);
  if (c.lse)
    c.lse[it.sequence.lse + h * c.lse_stride[1] + l * c.lse_stride[2]] =
        total == 0.0f ? -inf : safe * p.lse_factor + std::log(total);
}

void merge_part(Run& run, int64_t part, char* scratch) {
  const Item it = part_at(run.plan, part);
  if (!it.partial) return;
  for (int64_t i = 0; i < it.rows; ++i) merge_row(run.plan, i, it, reinterpret_cast<float*>(scratch));
}

void work(int64_t worker, void* ctx) {
  Run& run = *static_cast<Run*>(ctx);
  char* scratch = run.plan.scratch + worker * run.plan.scratch_bytes;
  for (int64_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.count;) run.step(run, i, scratch);
}

int run_all(const Plan& p, const Isa& isa, int64_t count, int64_t workers, void (*step)(Run&, int64_t, char*)) {
  Run run{p, isa, {0}, count, step};
  if (workers <= 1) {
    work(0, &run);
    return THAL_OK;
  }
  return p.call.parallel(workers, work, &run, p.call.parallel_user) ? THAL_PARALLEL_FAILED : THAL_OK;
}

bool pointers_missing(const Plan& p) {
  const thal_attention& c = p.call;
  if ((c.Ev > 0 && !c.out) || !c.q) return true;
  const thal_quantized* scaled = c.quantized;
  if (p.most_keys > 0 && scaled && (!scaled->key_scale || !scaled->value_scale)) return true;
  return p.most_keys > 0 && (!c.k || (c.Ev > 0 && !c.v) || (c.mask_kind != THAL_MASK_NONE && !c.mask));
}

}  // namespace
}  // namespace thal

namespace {

double work_of(const thal::Plan& p) {
  double pairs = 0;
  for (int64_t i = 0; i < p.sequence_count(); ++i)
    pairs += static_cast<double>(p.sequences()[i].L) * static_cast<double>(p.sequences()[i].S);
  const int64_t heads = p.call.Hq * (p.call.ragged ? 1 : p.call.B);
  return pairs * static_cast<double>(heads) * static_cast<double>(p.call.E + p.call.Ev);
}

}  // namespace

namespace thal {

int run_plan(Plan& plan, void* workspace) {
  if (plan.items == 0) return THAL_OK;
  if (pointers_missing(plan)) return THAL_BAD_POINTER;
  if (!workspace) return THAL_BAD_WORKSPACE;
  const int64_t reserved = std::max<int64_t>(1, std::min<int64_t>(plan.call.num_threads, plan.items));
  const int64_t workers = work_of(plan) < kSerialWork ? 1 : reserved;
  plan.scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t{63});
  plan.partials = reinterpret_cast<float*>(plan.scratch + reserved * plan.scratch_bytes);
  if (const int code = run_all(plan, *plan.isa, plan.items, workers, run_item)) return code;
  return plan.partial_count ? run_all(plan, *plan.isa, plan.parts, workers, merge_part) : THAL_OK;
}

}  // namespace thal

extern "C" int thal_attention_run(const thal_attention* call) {
  if (!call) return THAL_BAD_POINTER;
  try {
    thal::Plan plan;
    const int64_t needed = thal::make_plan(*call, plan);
    if (needed < 0) return static_cast<int>(-needed);
    return thal::run_plan(plan, call->workspace_size < needed ? nullptr : call->workspace);
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}
