// The dispatcher operator torchhal_cpu_x86::attention_backward: gradients of a call of differentiable_attention, whose
// arguments it begins with, from those of its results.
//
// The text that describes them, whole numbers again: whether the mask's gradient is wanted, the contributions to
// captured tensors (three numbers each, after their count), and the words of the score_mod's gradient after theirs.
#include "flex_call.hpp"
#include "gradient.hpp"

namespace thal {
namespace {

class Backward : FlexCall {
  enum { kGradient = 6, kGradOut, kGradLse, kOut, kLse };

  std::vector<int64_t> numbers_;
  std::vector<thal_contribution> contributions_;
  thal_gradients g_ = {};

 public:
  explicit Backward(uint64_t* stack) : FlexCall(stack, "attention_backward") {}

  void run() {
    bool ok = false;
    try {
      ok = read_call() && read_gradient() && read_results() && allocate() && compute();
    } catch (const std::bad_alloc&) {
      fail("no memory");
    }
    release_arguments();
    torch.release_string(reinterpret_cast<String>(stack_[kGradient]));
    for (int i = kGradOut; i <= kLse; ++i) torch.release(tensor(i));
    finish(ok, 4);
  }

 private:
  bool read_gradient() {
    size_t size = 0;
    const char* text = nullptr;
    const auto handle = reinterpret_cast<String>(stack_[kGradient]);
    if (torch.string_size(handle, &size) || torch.string_text(handle, &text)) return fail("gradient cannot be read");
    g_.struct_size = sizeof(g_);
    return (parse_numbers(text, size, numbers_) && split_numbers()) ||
           fail("gradient is not one that torchhal_cpu_x86.gradients has written");
  }

  bool split_numbers() {
    const auto count = static_cast<int64_t>(numbers_.size());
    if (count < 3 || numbers_[1] < 0 || numbers_[1] > (count - 3) / 3) return false;
    const int64_t* next = numbers_.data() + 2;
    for (int64_t i = 0; i < numbers_[1]; ++i, next += 3)
      contributions_.push_back({static_cast<int32_t>(next[0]), static_cast<int32_t>(next[1]),
                                static_cast<int32_t>(next[2]), 0, 0});
    g_.word_count = *next;
    g_.words = next + 1;
    return g_.word_count == numbers_.data() + count - g_.words && place_sums(numbers_[0] != 0);
  }

  // The mask's gradient, then those of the captured tensors that have one, in order.
  bool place_sums(bool wants_mask) {
    g_.mask_sum = -1;
    if (wants_mask) {
      if (!d_->has_mask) return false;
      g_.mask_sum = 0;
      for (int64_t i = 3, step = 1; i >= 0 && i >= 4 - mask_.dim; --i) {
        const int64_t size = mask_.sizes[i - (4 - mask_.dim)];
        g_.mask_sum_stride[i] = size == 1 ? 0 : step;
        step *= size;
      }
      g_.sum_count = elements(mask_.sizes, mask_.dim);
    }
    for (size_t t = 0; t < captured_[0].size(); ++t) {
      bool found = false;
      for (thal_contribution& c : contributions_)
        if (c.captured == static_cast<int32_t>(t)) c.offset = g_.sum_count, found = true;
      if (found) g_.sum_count += elements(captured_[0][t].sizes, captured_[0][t].dims);
    }
    g_.contributions = contributions_.data();
    g_.contribution_count = static_cast<int32_t>(contributions_.size());
    return true;
  }

  static int64_t elements(const int64_t* sizes, int64_t dims) {
    int64_t count = 1;
    for (int64_t i = 0; i < dims; ++i) count *= sizes[i];
    return count;
  }

  // The results of the forward pass and their gradients.
  bool read_results() {
    View out, above, lse, lse_above;
    const int64_t dim = query_.dim;
    if (!read(tensor(kOut), "out", dim, dim, out) || !read(tensor(kGradOut), "grad_out", dim, dim, above) ||
        !read(tensor(kLse), "lse", dim - 1, dim - 1, lse) || !read(tensor(kGradLse), "grad_lse", 1, dim - 1, lse_above))
      return false;
    if (out.dtype != query_.dtype || above.dtype != query_.dtype) return fail("out and grad_out must be of the query's dtype");
    const int32_t wanted = lse_dtype(query_.dtype);
    if (lse.dtype != wanted || lse_above.dtype != wanted)
      return fail("lse and grad_lse must be float32, or float64 for such a query");
    const bool alike = std::equal(query_.sizes, query_.sizes + dim - 1, out.sizes) && out.sizes[dim - 1] == c_.Ev &&
                       std::equal(out.sizes, out.sizes + dim, above.sizes) &&
                       std::equal(out.sizes, out.sizes + dim - 1, lse.sizes);
    if (!alike)
      return fail("out %s, grad_out %s and lse %s do not fit the query %s", shape_of(out).c_str(), shape_of(above).c_str(),
                  shape_of(lse).c_str(), shape_of(query_).c_str());
    c_.out = out.data, c_.lse = lse.data, g_.grad_out = above.data;
    set_strides(out, c_.out_stride), set_strides(above, g_.grad_out_stride), set_lse_strides(lse, c_.lse_stride);
    if (lse_above.dim == 1 && dim > 2) return lse_above.sizes[0] == 0 || fail("grad_lse does not fit the lse");
    if (!std::equal(lse.sizes, lse.sizes + dim - 1, lse_above.sizes)) return fail("grad_lse does not fit the lse");
    g_.grad_lse = lse_above.data;
    set_lse_strides(lse_above, g_.grad_lse_stride);
    return true;
  }

  static void set_lse_strides(const View& v, int64_t* out) {
    if (v.dim == 3) {
      std::copy(v.strides, v.strides + 3, out);
    } else {
      out[0] = 0, out[1] = v.strides[1], out[2] = v.strides[0];
    }
  }

  // Each gradient is laid out like its tensor, and the sums are float64. Sequences may share pages, whose gradients are
  // therefore summed in float32 over all of them.
  bool allocate() {
    void** const data[] = {&g_.grad_q, &g_.grad_k, &g_.grad_v};
    int64_t* const strides[] = {g_.grad_q_stride, g_.grad_k_stride, g_.grad_v_stride};
    const View* const like[] = {&query_, &key_, &value_};
    for (int i = 0; i < 3; ++i) {
      int64_t size[4] = {1, 1, 1, 1}, stride[4] = {0, 0, 0, 0}, found[4];
      const int64_t skip = 4 - like[i]->dim;
      std::copy(like[i]->sizes, like[i]->sizes + like[i]->dim, size + skip);
      std::copy(like[i]->strides, like[i]->strides + like[i]->dim, stride + skip);
      if (skip) stride[0] = size[1] * stride[1];
      strides_like(size, stride, found);
      const int32_t dtype = i && d_->layout == kPaged ? lse_dtype(query_.dtype) : query_.dtype;
      if (!make(i, like[i]->dim, size + skip, found + skip, dtype, data[i])) return false;
      if (i && d_->layout == kPaged) std::memset(*data[i], 0, bytes_of(size, found, query_.dtype == torch.float64() ? 8 : 4));
      set_strides({like[i]->dim, size + skip, found + skip}, strides[i]);
    }
    const int64_t one = 1;
    void* sums = nullptr;
    if (!make(3, 1, &g_.sum_count, &one, torch.float64(), &sums)) return false;
    g_.sums = static_cast<double*>(sums);
    return true;
  }

  // All that strides_like spans is a tensor's own.
  static size_t bytes_of(const int64_t* size, const int64_t* stride, int64_t width) {
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) {
      if (size[i] == 0) return 0;
      last += (size[i] - 1) * stride[i];
    }
    return static_cast<size_t>((last + 1) * width);
  }

  bool compute() {
    use_threads(c_);
    GradientPlan plan;
    if (d_->has_mask) {  // the mask's strides come with the lengths, and those with a plan of the tiles
      if (const int64_t bytes = make_plan(c_, plan.p); bytes < 0) return fail("%s", thal_error_text(static_cast<int>(-bytes)));
      if (!describe_mask(plan.p)) return false;
      plan = GradientPlan();
    }
    const int64_t bytes = make_gradient_plan(c_, g_, plan);
    if (bytes < 0) return fail("%s", thal_error_text(static_cast<int>(-bytes)));
    return in_workspace(bytes, [&plan](void* memory) { return run_gradient_plan(plan, memory); });
  }
};

}  // namespace

void attention_backward_kernel(uint64_t* stack, uint64_t, uint64_t) { Backward(stack).run(); }

}  // namespace thal
