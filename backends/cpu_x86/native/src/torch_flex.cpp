// The dispatcher operators torchhal_cpu_x86::flex_attention and differentiable_attention, which computes the same and
// takes one more text, for its backward pass.
#include "flex_call.hpp"

namespace thal {
namespace {

class Forward : FlexCall {
  String gradient_;  // null: there is none

 public:
  Forward(uint64_t* stack, bool differentiable)
      : FlexCall(stack, differentiable ? "differentiable_attention" : "flex_attention"),
        gradient_(differentiable ? reinterpret_cast<String>(stack[6]) : nullptr) {}

  void run() {
    bool ok = false;
    try {
      ok = read_call() && allocate() && compute();
    } catch (const std::bad_alloc&) {
      fail("no memory");
    }
    release_arguments();
    if (gradient_) torch.release_string(gradient_);
    finish(ok, 3);
  }

 private:
  bool allocate() {
    const bool packed = d_->layout == kVarlen;
    const int64_t heads = std::max<int64_t>(c_.Hq, 1), rows = std::max<int64_t>(c_.L, 1);
    if (packed) {
      const int64_t size[3] = {query_.sizes[0], c_.Hq, c_.Ev}, width = std::max<int64_t>(c_.Ev, 1);
      const int64_t stride[3] = {heads * width, width, 1}, lse_stride[2] = {heads, 1};
      c_.out_stride[1] = width, c_.out_stride[2] = heads * width, c_.out_stride[3] = 1;
      c_.lse_stride[1] = 1, c_.lse_stride[2] = heads;
      if (!make(0, 3, size, stride, query_.dtype, &c_.out)) return false;
      return make_rows(1, d_->return_lse, 2, size, lse_stride, &c_.lse) &&
             make_rows(2, d_->return_max_scores, 2, size, lse_stride, &c_.max_scores);
    }
    const int64_t size[4] = {c_.B, c_.Hq, c_.L, c_.Ev};
    c_.lse_stride[0] = heads * rows, c_.lse_stride[1] = rows, c_.lse_stride[2] = 1;
    lay_out_like_query(c_);
    if (!make(0, 4, size, c_.out_stride, query_.dtype, &c_.out)) return false;
    return make_rows(1, d_->return_lse, 3, size, c_.lse_stride, &c_.lse) &&
           make_rows(2, d_->return_max_scores, 3, size, c_.lse_stride, &c_.max_scores);
  }

  // A result with a number for each row, or an empty one where it is not asked for.
  bool make_rows(int result, bool asked, int64_t dim, const int64_t* size, const int64_t* stride, void** data) {
    const int64_t none = 0, one = 1;
    void* nothing = nullptr;
    return asked ? make(result, dim, size, stride, lse_dtype(query_.dtype), data)
                 : make(result, 1, &none, &one, lse_dtype(query_.dtype), &nothing);
  }

  bool compute() {
    use_threads(c_);
    Plan plan;
    const int64_t bytes = make_plan(c_, plan);
    if (bytes < 0) return fail("%s", thal_error_text(static_cast<int>(-bytes)));
    // The mask's strides come last: how many rows and keys it must have is known only now.
    if (d_->has_mask && !describe_mask(plan)) return false;
    const int64_t again = d_->has_mask ? make_plan(c_, plan) : bytes;
    return again < 0 ? fail("%s", thal_error_text(static_cast<int>(-again))) : TorchCall::run(plan, again);
  }
};

}  // namespace

void flex_attention_kernel(uint64_t* stack, uint64_t, uint64_t) { Forward(stack, false).run(); }
void differentiable_attention_kernel(uint64_t* stack, uint64_t, uint64_t) { Forward(stack, true).run(); }

}  // namespace thal
