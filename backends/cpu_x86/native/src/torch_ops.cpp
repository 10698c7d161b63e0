// The dispatcher operators torchhal_cpu_x86::attention, attention_lse, masked_attention, masked_attention_lse.
//
// A boxed kernel owns the tensor handles on its stack and must release them on every path; an error is raised, after
// that, through torch's own check function, so that it reaches Python as an ordinary exception.
#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "plan.hpp"
#include "strides.hpp"
#include "torch_shim.hpp"

namespace {

using thal::Tensor;

thal::TorchShim torch;
bool registered = false;

// OpenMP's threads do not survive a fork, and a child of a process that has used them hangs in its first parallel
// region, in torch's own kernels too. So a forked child computes on its one thread.
std::atomic<bool> forked{false};

void watch_forks() {
#ifndef _WIN32
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
}

constexpr const char* kSymbolNames[] = {
#define THAL_NAME(field, result, arguments, symbol) #symbol,
    THAL_TORCH_SYMBOLS(THAL_NAME) THAL_OPTIONAL_TORCH_SYMBOLS(THAL_NAME)
#undef THAL_NAME
};
constexpr int32_t kSymbols = sizeof(kSymbolNames) / sizeof(kSymbolNames[0]);
constexpr int32_t kOptional = 2;  // the last ones

// torch 2.10.0, in the encoding of torch/headeronly/version.h: the release whose calling convention is used here.
constexpr uint64_t kBuiltFor = 2ull << 56 | 10ull << 48;

// Kept per thread between calls, since allocating and faulting in a megabyte costs more than a small call; larger ones
// are given back after the call.
class Workspace {
  void* memory_ = nullptr;
  int64_t size_ = 0;
  static constexpr int64_t kKeep = int64_t{64} << 20;

 public:
  ~Workspace() { std::free(memory_); }
  void* get(int64_t size) {
    if (size <= size_) return memory_;
    std::free(memory_);
    memory_ = std::malloc(static_cast<size_t>(size));
    size_ = memory_ ? size : 0;
    return memory_;
  }
  void trim() {
    if (size_ <= kKeep) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }
};
thread_local Workspace workspace;

struct View {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = -1;
  void* data = nullptr;
};

class Call {
  uint64_t* stack_;
  bool masked_, lse_;
  int inputs_;  // tensors among the arguments
  View view_[4];
  Tensor results_[2] = {nullptr, nullptr};
  char message_[512] = "";

 public:
  Call(uint64_t* stack, bool masked, bool lse) : stack_(stack), masked_(masked), lse_(lse), inputs_(masked ? 4 : 3) {}

  void run() {
    const bool ok = execute();
    for (int i = 0; i < inputs_; ++i) torch.release(tensor(i));
    if (ok) {
      stack_[0] = reinterpret_cast<uint64_t>(results_[0]);
      if (lse_) stack_[1] = reinterpret_cast<uint64_t>(results_[1]);
      return;
    }
    for (Tensor t : results_)
      if (t) torch.release(t);
    torch.check(false, "attention", "torchhal_cpu_x86", 0, message_);
  }

 private:
  Tensor tensor(int i) const { return reinterpret_cast<Tensor>(stack_[i]); }

  template <class... Args>
  bool fail(const char* format, Args... args) {
    char text[400];
    std::snprintf(text, sizeof(text), format, args...);
    std::snprintf(message_, sizeof(message_), "torchhal_cpu_x86::%sattention%s: %s", masked_ ? "masked_" : "",
                  lse_ ? "_lse" : "", text);
    return false;
  }

  bool execute() {
    static const char* const names[] = {"query", "key", "value", "mask"};
    for (int i = 0; i < inputs_; ++i)
      if (!read(i, names[i])) return false;
    thal_attention c = {};
    return check_shapes() && describe(c) && allocate(c) && compute(c);
  }

  bool read(int i, const char* name) {
    View& v = view_[i];
    int32_t device = -1;
    if (torch.device_type(tensor(i), &device)) return fail("%s cannot be read: a dense CPU tensor is needed", name);
    if (device != torch.cpu()) return fail("%s must be a CPU tensor, as the others are: move all to one device", name);
    if (torch.dim(tensor(i), &v.dim) || torch.sizes(tensor(i), &v.sizes) || torch.strides(tensor(i), &v.strides) ||
        torch.dtype(tensor(i), &v.dtype) || torch.data(tensor(i), &v.data))
      return fail("%s cannot be read: a dense CPU tensor is needed", name);
    if (i == 3 ? v.dim > 4 : v.dim != 4)
      return fail("%s must have %s dimensions, got %lld", name, i == 3 ? "0 to 4" : "4", static_cast<long long>(v.dim));
    if (!v.data && !std::count(v.sizes, v.sizes + v.dim, 0))
      return fail("%s %s has elements and no memory: a dense CPU tensor is needed", name, shape(v).c_str());
    return true;
  }

  static std::string shape(const View& v) {
    std::string text = "(";
    for (int64_t i = 0; i < v.dim; ++i) text += (i ? ", " : "") + std::to_string(v.sizes[i]);
    return text + ")";
  }

  bool check_shapes() {
    const int64_t *q = view_[0].sizes, *k = view_[1].sizes, *v = view_[2].sizes;
    const char* wrong = nullptr;
    if (k[0] != q[0] || v[0] != q[0]) wrong = "batch sizes differ";
    if (k[3] != q[3]) wrong = "query and key have different head sizes";
    if (k[2] != v[2]) wrong = "key and value have different lengths";
    if (k[1] != v[1]) wrong = "key and value have different numbers of heads";
    if (k[1] ? q[1] % k[1] : q[1]) wrong = "query heads must be a multiple of key heads";
    if (q[3] < 1) wrong = "the head size of query and key must be at least 1";
    if (!wrong) return true;
    return fail("%s: query %s, key %s, value %s; expected (B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev)", wrong,
                shape(view_[0]).c_str(), shape(view_[1]).c_str(), shape(view_[2]).c_str());
  }

  bool describe(thal_attention& c) {
    c.struct_size = sizeof(c);
    c.dtype = code_of(view_[0].dtype);
    if (c.dtype < 0) return fail("dtype must be float32, bfloat16 or float16");
    if (view_[1].dtype != view_[0].dtype || view_[2].dtype != view_[0].dtype)
      return fail("query, key and value must have the same dtype");
    const int64_t *q = view_[0].sizes, *k = view_[1].sizes, *v = view_[2].sizes;
    c.B = q[0], c.Hq = q[1], c.L = q[2], c.E = q[3], c.Hkv = k[1], c.S = k[2], c.Ev = v[3];
    std::copy(view_[0].strides, view_[0].strides + 4, c.q_stride);
    std::copy(view_[1].strides, view_[1].strides + 4, c.k_stride);
    std::copy(view_[2].strides, view_[2].strides + 4, c.v_stride);
    c.q = view_[0].data, c.k = view_[1].data, c.v = view_[2].data;
    double scale;
    std::memcpy(&scale, &stack_[inputs_ + 1], sizeof(scale));
    c.scale = static_cast<float>(scale);
    c.is_causal = (stack_[inputs_] & 0xff) != 0;
    return !masked_ || describe_mask(c);
  }

  int32_t code_of(int32_t dtype) const {
    if (dtype == torch.float32()) return THAL_F32;
    if (dtype == torch.bfloat16()) return THAL_BF16;
    return dtype == torch.float16() ? THAL_F16 : -1;
  }

  bool describe_mask(thal_attention& c) {
    const View& m = view_[3];
    const int32_t code = code_of(m.dtype);
    if (code < 0 && m.dtype != torch.boolean()) return fail("mask must be boolean, float32, bfloat16 or float16");
    c.mask_kind = code < 0 ? THAL_MASK_BOOL : THAL_MASK_F32 + code;
    c.mask = m.data;
    const int64_t full[4] = {c.B, c.Hq, c.L, c.S};
    for (int i = 0; i < 4; ++i) {
      const int64_t j = i - (4 - m.dim);
      if (j < 0) continue;  // a missing leading dimension is broadcast: stride 0
      if (m.sizes[j] != full[i] && m.sizes[j] != 1)
        return fail("mask %s does not broadcast to (B, Hq, L, S) = (%lld, %lld, %lld, %lld)", shape(m).c_str(),
                    static_cast<long long>(full[0]), static_cast<long long>(full[1]), static_cast<long long>(full[2]),
                    static_cast<long long>(full[3]));
      c.mask_stride[i] = m.sizes[j] == 1 ? 0 : m.strides[j];
    }
    return true;
  }

  // Laid out as torch's own kernel for CPUs lays its output out, so that a view that works on torch's works on ours.
  bool allocate(thal_attention& c) {
    const int64_t size[4] = {c.B, c.Hq, c.L, c.Ev};
    const bool alike = c.Ev == c.E && c.q_stride[3] == 1;
    if (alike) thal::strides_like(size, c.q_stride, c.out_stride);
    // torch 2.13 lays the output of an expanded query out with rows that are not contiguous, and then computes as if
    // they were: the one layout not worth following.
    if (!alike || c.out_stride[3] != 1) thal::contiguous_strides(size, c.out_stride);
    const int64_t rows = std::max<int64_t>(c.L, 1), heads = std::max<int64_t>(c.Hq, 1);
    if (torch.empty(4, size, c.out_stride, view_[0].dtype, torch.cpu(), 0, &results_[0]) ||
        torch.data(results_[0], &c.out))
      return fail("no memory for the output");
    if (!lse_) return true;
    c.lse_stride[0] = heads * rows, c.lse_stride[1] = rows, c.lse_stride[2] = 1;
    void* data = nullptr;
    if (torch.empty(3, size, c.lse_stride, torch.float32(), torch.cpu(), 0, &results_[1]) ||
        torch.data(results_[1], &data))
      return fail("no memory for the log-sum-exp");
    c.lse = static_cast<float*>(data);
    return true;
  }

  bool compute(thal_attention& c) {
    uint32_t threads = 1;
    if (!forked) torch.num_threads(&threads);
    c.num_threads = static_cast<int32_t>(std::max(threads, 1u));
    c.parallel = thal_torch_parallel;
    c.workspace_size = thal_attention_workspace(&c);
    if (c.workspace_size < 0) return fail("%s", thal_error_text(static_cast<int>(-c.workspace_size)));
    c.workspace = workspace.get(c.workspace_size);
    if (!c.workspace) return fail("no memory for a workspace of %lld bytes", static_cast<long long>(c.workspace_size));
    const int code = thal_attention_run(&c);
    workspace.trim();
    return code == THAL_OK || fail("%s", thal_error_text(code));
  }
};

template <bool MASKED, bool LSE>
void kernel(uint64_t* stack, uint64_t, uint64_t) {
  Call(stack, MASKED, LSE).run();
}

struct Range {
  thal_task task;
  void* ctx;
};

struct Operator {
  const char *name, *schema;
  thal::Kernel kernel;
};

const Operator kOperators[] = {
    {"attention", "attention(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) -> Tensor",
     kernel<false, false>},
    {"attention_lse",
     "attention_lse(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) -> (Tensor, Tensor)",
     kernel<false, true>},
    {"masked_attention",
     "masked_attention(Tensor query, Tensor key, Tensor value, Tensor mask, bool is_causal, float scale) -> Tensor",
     kernel<true, false>},
    {"masked_attention_lse",
     "masked_attention_lse(Tensor query, Tensor key, Tensor value, Tensor mask, bool is_causal, float scale)"
     " -> (Tensor, Tensor)",
     kernel<true, true>},
};

// Without a kernel for autograd, torch would compute and lose the derivatives: a warning in backward, zero tangents in
// forward mode. Where this build does not find torch's refusing kernel, the Python side registers a slower one.
bool refuse_gradients() {
  thal::Library kernels = nullptr;  // kept for the life of the process
  if (!torch.refuse_gradients || !torch.implement_function) return false;
  if (torch.new_impl("torchhal_cpu_x86", "Autograd", __FILE__, __LINE__, &kernels)) return false;
  for (const Operator& op : kOperators) {
    alignas(64) char function[4096] = {};  // a CppFunction, which is about 200 bytes
    torch.refuse_gradients(function);
    torch.implement_function(kernels, op.name, function, 0);
  }
  return true;
}

int register_operators(char* message, int32_t size) {
  thal::Library definitions = nullptr, kernels = nullptr;  // kept for the life of the process, as the operators are
  int32_t code = torch.new_fragment("torchhal_cpu_x86", __FILE__, __LINE__, &definitions);
  if (!code) code = torch.new_impl("torchhal_cpu_x86", "CPU", __FILE__, __LINE__, &kernels);
  for (const Operator& op : kOperators) {
    if (!code) code = torch.define(definitions, op.schema);
    if (!code) code = torch.implement(kernels, op.name, op.kernel, kBuiltFor);
    if (code) {
      std::snprintf(message, static_cast<size_t>(size), "torch refused the operator %s", op.name);
      return THAL_BAD_STRUCT;
    }
  }
  return THAL_OK;
}

}  // namespace

extern "C" int32_t thal_torch_symbol_count(void) { return kSymbols; }

extern "C" const char* thal_torch_symbol_name(int32_t index) {
  return index >= 0 && index < kSymbols ? kSymbolNames[index] : nullptr;
}

extern "C" int thal_torch_register(void* const* addresses, int32_t count, char* message, int32_t message_size) {
  if (registered) return THAL_OK;
  if (count != kSymbols) {
    std::snprintf(message, static_cast<size_t>(message_size), "expected %d addresses, got %d", kSymbols, count);
    return THAL_BAD_STRUCT;
  }
  for (int32_t i = 0; i < count - kOptional; ++i)
    if (!addresses[i]) {
      std::snprintf(message, static_cast<size_t>(message_size), "this torch has no %s", kSymbolNames[i]);
      return THAL_BAD_POINTER;
    }
  int32_t at = 0;
#define THAL_TAKE(field, result, arguments, symbol) \
  torch.field = reinterpret_cast<decltype(torch.field)>(reinterpret_cast<uintptr_t>(addresses[at++]));
  THAL_TORCH_SYMBOLS(THAL_TAKE)
  THAL_OPTIONAL_TORCH_SYMBOLS(THAL_TAKE)
#undef THAL_TAKE
  const int code = register_operators(message, message_size);
  registered = code == THAL_OK;
  if (registered) watch_forks();
  if (registered) refuse_gradients();
  return code;
}

extern "C" int thal_torch_parallel(int64_t n, thal_task task, void* ctx, void*) {
  Range range{task, ctx};
  const auto body = [](int64_t begin, int64_t end, void* raw) {
    const Range& r = *static_cast<Range*>(raw);
    for (int64_t i = begin; i < end; ++i) r.task(i, r.ctx);
  };
  return torch.parallel_for(0, n, 1, body, &range);
}
