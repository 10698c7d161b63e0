// What the boxed kernels share: reading tensors, results, a workspace, and errors.
//
// A boxed kernel owns the handles on its stack and must release them on every path; an error is raised, after that,
// through torch's own check function, so that it reaches Python as an ordinary exception.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "plan.hpp"
#include "strides.hpp"
#include "torch_shim.hpp"

namespace thal {

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
inline thread_local Workspace workspace;

struct View {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = -1;
  void* data = nullptr;
};

inline std::string shape_of(const View& v) {
  std::string text = "(";
  for (int64_t i = 0; i < v.dim; ++i) text += (i ? ", " : "") + std::to_string(v.sizes[i]);
  return text + ")";
}

// Whole numbers; false where the text holds anything else.
inline bool parse_numbers(const char* text, size_t size, std::vector<int64_t>& out) {
  size_t i = 0;
  while (i < size) {
    const bool negative = text[i] == '-';
    i += negative;
    uint64_t number = 0;
    size_t digits = 0;
    for (; i < size && text[i] >= '0' && text[i] <= '9'; ++i, ++digits) {
      if (digits >= 19) return false;
      number = number * 10 + static_cast<uint64_t>(text[i] - '0');
    }
    if (!digits || (i < size && text[i] != ' ')) return false;
    out.push_back(static_cast<int64_t>(negative ? 0 - number : number));
    ++i;
  }
  return true;
}

class TorchCall {
 protected:
  uint64_t* stack_;
  std::string name_;
  Tensor results_[4] = {};
  char message_[512] = "";

  TorchCall(uint64_t* stack, std::string name) : stack_(stack), name_(std::move(name)) {}

  Tensor tensor(int i) const { return reinterpret_cast<Tensor>(stack_[i]); }

  // Puts the results on the stack, which holds no handles any more, or raises.
  void finish(bool ok, int results) {
    if (ok) {
      for (int i = 0; i < results; ++i) stack_[i] = reinterpret_cast<uint64_t>(results_[i]);
      return;
    }
    for (Tensor t : results_)
      if (t) torch.release(t);
    torch.check(false, "attention", "torchhal_cpu_x86", 0, message_);
  }

  template <class... Args>
  bool fail(const char* format, Args... args) {
    char text[400];
    std::snprintf(text, sizeof(text), format, args...);
    std::snprintf(message_, sizeof(message_), "torchhal_cpu_x86::%s: %s", name_.c_str(), text);
    return false;
  }

  // A tensor of `least` to `most` dimensions.
  bool read(Tensor tensor, const char* name, int64_t least, int64_t most, View& v) {
    int32_t device = -1;
    if (torch.device_type(tensor, &device)) return fail("%s cannot be read: a dense CPU tensor is needed", name);
    if (device != torch.cpu()) return fail("%s must be a CPU tensor, as the others are: move all to one device", name);
    if (torch.dim(tensor, &v.dim) || torch.sizes(tensor, &v.sizes) || torch.strides(tensor, &v.strides) ||
        torch.dtype(tensor, &v.dtype) || torch.data(tensor, &v.data))
      return fail("%s cannot be read: a dense CPU tensor is needed", name);
    if (v.dim < least || v.dim > most) {
      const std::string range = (least < most ? std::to_string(least) + " to " : "") + std::to_string(most);
      return fail("%s must have %s dimensions, got %lld", name, range.c_str(), static_cast<long long>(v.dim));
    }
    if (!v.data && !std::count(v.sizes, v.sizes + v.dim, 0))
      return fail("%s %s has elements and no memory: a dense CPU tensor is needed", name, shape_of(v).c_str());
    return true;
  }

  // Of a log-sum-exp, which has the type that scores are computed in.
  static int32_t lse_dtype(int32_t dtype) { return dtype == torch.float64() ? dtype : torch.float32(); }

  // A place in torchhal.pointwise.dtypes.DTYPES.
  static int32_t type_of(int32_t dtype) {
    const int32_t order[] = {torch.float64(), torch.float32(), torch.bfloat16(), torch.float16(), torch.int64(),
                             torch.int32(),   torch.int16(),   torch.int8(),     torch.uint8(),   torch.boolean()};
    const auto* found = std::find(std::begin(order), std::end(order), dtype);
    return found == std::end(order) ? -1 : static_cast<int32_t>(found - order);
  }

  static int32_t code_of(int32_t dtype) {
    if (dtype == torch.float32()) return THAL_F32;
    if (dtype == torch.bfloat16()) return THAL_BF16;
    if (dtype == torch.float64()) return THAL_F64;
    return dtype == torch.float16() ? THAL_F16 : -1;
  }

  bool describe_dtypes(thal_attention& c, const View& query, const View& key, const View& value, bool quantized = false) {
    c.struct_size = sizeof(c);
    c.dtype = code_of(query.dtype);
    if (c.dtype < 0) return fail("dtype must be float32, bfloat16, float16 or float64");
    if (!quantized && (key.dtype != query.dtype || value.dtype != query.dtype))
      return fail("query, key and value must have the same dtype");
    c.q = query.data, c.k = key.data, c.v = value.data;
    return true;
  }

  bool describe_mask_dtype(thal_attention& c, const View& mask) {
    const int32_t code = code_of(mask.dtype);
    if (code < 0 && mask.dtype != torch.boolean()) return fail("mask must be boolean, float32, bfloat16 or float16, or float64 for such a query");
    c.mask_kind = code < 0 ? THAL_MASK_BOOL : THAL_MASK_F32 + code;
    if (c.mask_kind == THAL_MASK_F64 && c.dtype != THAL_F64) return fail("a float64 mask needs a float64 query");
    c.mask = mask.data;
    return true;
  }

  // Laid out as torch's own kernel for CPUs lays its output out, so that a view that works on torch's works on ours.
  static void lay_out_like_query(thal_attention& c) {
    const int64_t size[4] = {c.B, c.Hq, c.L, c.Ev};
    const bool alike = c.Ev == c.E && c.q_stride[3] == 1;
    if (alike) strides_like(size, c.q_stride, c.out_stride);
    // torch 2.13 lays the output of an expanded query out with rows that are not contiguous, and then computes as if
    // they were: the one layout not worth following.
    if (!alike || c.out_stride[3] != 1) contiguous_strides(size, c.out_stride);
  }

  bool make(int i, int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype, void** data) {
    if (torch.empty(dim, size, stride, dtype, torch.cpu(), 0, &results_[i]) || torch.data(results_[i], data))
      return fail("no memory for result %d", i);
    return true;
  }

  static void use_threads(thal_attention& c) {
    uint32_t threads = 1;
    if (!is_forked()) torch.num_threads(&threads);
    c.num_threads = static_cast<int32_t>(std::max(threads, 1u));
    c.parallel = thal_torch_parallel;
  }

  // f(memory) with a workspace; gives the code of what it ran.
  template <class F>
  bool in_workspace(int64_t bytes, F f) {
    void* memory = workspace.get(bytes);
    if (!memory) return fail("no memory for a workspace of %lld bytes", static_cast<long long>(bytes));
    const int code = f(memory);
    workspace.trim();
    return code == THAL_OK || fail("%s", thal_error_text(code));
  }

  bool run(Plan& plan, int64_t bytes) {
    return in_workspace(bytes, [&plan](void* memory) { return run_plan(plan, memory); });
  }
};

}  // namespace thal
