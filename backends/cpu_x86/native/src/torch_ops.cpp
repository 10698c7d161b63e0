// The dispatcher operators torchhal_cpu_x86::attention, attention_lse, masked_attention, masked_attention_lse, and the
// registration of all operators.
#ifndef _WIN32
#include <pthread.h>
#endif

#include <atomic>
#include <cstring>

#include "torch_call.hpp"

namespace thal {
TorchShim torch;
}  // namespace thal

namespace {

using thal::torch;
bool registered = false;
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
constexpr int32_t kOptional = 3;  // the last ones

// torch 2.10.0, in the encoding of torch/headeronly/version.h: the release whose calling convention is used here.
constexpr uint64_t kBuiltFor = 2ull << 56 | 10ull << 48;

class Call : thal::TorchCall {
  bool masked_, lse_;
  int inputs_;  // tensors among the arguments
  thal::View view_[4];

 public:
  Call(uint64_t* stack, bool masked, bool lse)
      : TorchCall(stack, std::string(masked ? "masked_" : "") + "attention" + (lse ? "_lse" : "")),
        masked_(masked), lse_(lse), inputs_(masked ? 4 : 3) {}

  void run() {
    const bool ok = execute();
    for (int i = 0; i < inputs_; ++i) torch.release(tensor(i));
    finish(ok, lse_ ? 2 : 1);
  }

 private:
  bool execute() {
    static const char* const names[] = {"query", "key", "value", "mask"};
    for (int i = 0; i < inputs_; ++i)
      if (!read(tensor(i), names[i], i == 3 ? 0 : 4, 4, view_[i])) return false;
    thal_attention c = {};
    return check_shapes() && describe(c) && allocate(c) && compute(c);
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
                shape_of(view_[0]).c_str(), shape_of(view_[1]).c_str(), shape_of(view_[2]).c_str());
  }

  bool describe(thal_attention& c) {
    if (!describe_dtypes(c, view_[0], view_[1], view_[2])) return false;
    const int64_t *q = view_[0].sizes, *k = view_[1].sizes, *v = view_[2].sizes;
    c.B = q[0], c.Hq = q[1], c.L = q[2], c.E = q[3], c.Hkv = k[1], c.S = k[2], c.Ev = v[3];
    std::copy(view_[0].strides, view_[0].strides + 4, c.q_stride);
    std::copy(view_[1].strides, view_[1].strides + 4, c.k_stride);
    std::copy(view_[2].strides, view_[2].strides + 4, c.v_stride);
    double scale;
    std::memcpy(&scale, &stack_[inputs_ + 1], sizeof(scale));
    c.scale = scale;
    c.is_causal = (stack_[inputs_] & 0xff) != 0;
    return !masked_ || describe_mask(c);
  }

  bool describe_mask(thal_attention& c) {
    const thal::View& m = view_[3];
    if (!describe_mask_dtype(c, m)) return false;
    const int64_t full[4] = {c.B, c.Hq, c.L, c.S};
    for (int i = 0; i < 4; ++i) {
      const int64_t j = i - (4 - m.dim);
      if (j < 0) continue;  // a missing leading dimension is broadcast: stride 0
      if (m.sizes[j] != full[i] && m.sizes[j] != 1)
        return fail("mask %s does not broadcast to (B, Hq, L, S) = (%lld, %lld, %lld, %lld)", shape_of(m).c_str(),
                    static_cast<long long>(full[0]), static_cast<long long>(full[1]), static_cast<long long>(full[2]),
                    static_cast<long long>(full[3]));
      c.mask_stride[i] = m.sizes[j] == 1 ? 0 : m.strides[j];
    }
    return true;
  }

  bool allocate(thal_attention& c) {
    const int64_t size[4] = {c.B, c.Hq, c.L, c.Ev};
    lay_out_like_query(c);
    if (!make(0, 4, size, c.out_stride, view_[0].dtype, &c.out)) return false;
    if (!lse_) return true;
    const int64_t rows = std::max<int64_t>(c.L, 1), heads = std::max<int64_t>(c.Hq, 1);
    c.lse_stride[0] = heads * rows, c.lse_stride[1] = rows, c.lse_stride[2] = 1;
    void* data = nullptr;
    if (!make(1, 3, size, c.lse_stride, lse_dtype(view_[0].dtype), &data)) return false;
    c.lse = data;
    return true;
  }

  bool compute(thal_attention& c) {
    use_threads(c);
    thal::Plan plan;
    const int64_t bytes = thal::make_plan(c, plan);
    return bytes < 0 ? fail("%s", thal_error_text(static_cast<int>(-bytes))) : TorchCall::run(plan, bytes);
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
    {"flex_attention",
     "flex_attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str description, float scale)"
     " -> (Tensor, Tensor, Tensor)",
     thal::flex_attention_kernel},
    {"differentiable_attention",
     "differentiable_attention(Tensor query, Tensor key, Tensor value, Tensor[] operands, str description, float scale,"
     " str gradient) -> (Tensor, Tensor, Tensor)",
     thal::differentiable_attention_kernel},
    {"attention_backward",
     "attention_backward(Tensor query, Tensor key, Tensor value, Tensor[] operands, str description, float scale,"
     " str gradient, Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor)",
     thal::attention_backward_kernel},
    {"foreach", "foreach(Tensor(a!)[] tensors, float[] numbers, int program) -> (Tensor[], bool)", thal::foreach_kernel},
    {"products", "products(Tensor a, Tensor[] parts, str chain) -> Tensor[]", thal::products_kernel},
};

// The one whose derivatives the Python side registers.
constexpr const char* kDifferentiable = "differentiable_attention";

// Without a kernel for autograd, torch would compute and lose the derivatives: a warning in backward, zero tangents in
// forward mode. Where this build does not find torch's refusing kernel, the Python side registers a slower one.
bool refuse_gradients() {
  thal::Library kernels = nullptr;  // kept for the life of the process
  if (!torch.refuse_gradients || !torch.implement_function) return false;
  if (torch.new_impl("torchhal_cpu_x86", "Autograd", __FILE__, __LINE__, &kernels)) return false;
  for (const Operator& op : kOperators) {
    if (!std::strcmp(op.name, kDifferentiable)) continue;
    alignas(64) char function[4096] = {};  // a CppFunction, which is about 200 bytes
    torch.refuse_gradients(function);
    torch.implement_function(kernels, op.name, function, 0);
  }
  return true;
}

// Of tensors that are no plain memory of the CPU. Some of them torch would compute first, and hand over what is not the
// memory that is to be written.
int register_declining() {
  for (const char* key : {"Negative", "Conjugate", "ZeroTensor", "CompositeExplicitAutograd"}) {
    thal::Library kernels = nullptr;  // kept for the life of the process
    const int32_t code = torch.new_impl("torchhal_cpu_x86", key, __FILE__, __LINE__, &kernels);
    if (code) return code;
    if (const int32_t refused = torch.implement(kernels, "foreach", thal::foreach_declined, kBuiltFor)) return refused;
    if (const int32_t refused = torch.implement(kernels, "products", thal::products_declined, kBuiltFor)) return refused;
  }
  return 0;
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
  if (!register_declining()) return THAL_OK;
  std::snprintf(message, static_cast<size_t>(size), "torch refused an operator of plain tensors");
  return THAL_BAD_STRUCT;
}

}  // namespace

bool thal::is_forked() { return forked; }

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
