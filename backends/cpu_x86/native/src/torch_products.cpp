// The dispatcher operator torchhal_cpu_x86::products: a prepared chain of products on one tensor that is plain memory.
//
// Weights and biases come with each call, so that whoever moves or replaces one is never read from where it was. What is not
// as the chain was prepared for gives no results: nothing is written then, and the caller looks closer.
#include <algorithm>
#include <new>

#include "chain.hpp"
#include "torch_call.hpp"

namespace thal {
namespace {

class Products : TorchCall {
  enum { kA, kParts, kChain };

  List parts_, made_ = nullptr;
  std::shared_ptr<const Chain> chain_;
  std::vector<Tensor> handles_;  // of the parts
  View a_;
  int64_t rows_ = 1;

 public:
  explicit Products(uint64_t* stack)
      : TorchCall(stack, "products"), parts_(reinterpret_cast<List>(stack[kParts])),
        chain_(find_chain(static_cast<int64_t>(stack[kChain]))) {}

  void run() {
    bool ok = false;
    try {
      ok = open() && (!fits() || compute());
    } catch (const std::bad_alloc&) {
      fail("no memory");
    }
    for (Tensor t : handles_) torch.release(t);
    torch.release(tensor(kA));
    torch.release_list(parts_);
    if (ok) {
      stack_[0] = reinterpret_cast<uint64_t>(made_);
      return;
    }
    if (made_) torch.release_list(made_);
    torch.check(false, "products", "torchhal_cpu_x86", 0, message_);
  }

 private:
  bool open() {
    size_t count = 0, wanted = 0;
    if (!chain_) return fail("chain is none that was prepared");
    for (const ChainStep& step : chain_->steps) wanted += static_cast<size_t>(step.parts());
    if (torch.list_size(parts_, &count) || count != wanted) return fail("%zu parts are not the %zu of the chain", count, wanted);
    handles_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      uint64_t item = 0;
      if (torch.list_item(parts_, i, &item)) return fail("parts cannot be read");
      handles_.push_back(reinterpret_cast<Tensor>(item));
    }
    return torch.new_list(0, &made_) == 0 || fail("no memory");
  }

  bool fits() {
    bool contiguous = false;
    if (!read(tensor(kA), "a", 1, 64, a_) || code_of(a_.dtype) != chain_->a_type) return false;
    if (torch.is_contiguous(tensor(kA), &contiguous) || !contiguous) return false;
    for (int64_t d = 0; d + 1 < a_.dim; ++d) rows_ *= a_.sizes[d];
    if (a_.sizes[a_.dim - 1] != chain_->steps[0].given.packed.rows || !rows_ || rows_ > INT32_MAX) return false;
    const Tensor* next = handles_.data();
    for (const ChainStep& step : chain_->steps) {
      const thal_packed& w = step.given.packed;
      const bool halves = w.scheme == THAL_PACKED_I4;
      const int64_t lines = is_blocks(w.scheme) ? w.columns : halves ? (w.rows + 1) / 2 : w.rows;
      const int64_t groups = (w.rows + w.group - 1) / w.group * w.columns;
      if (!has(*next++, w.scheme == THAL_PACKED_I8 ? torch.int8() : torch.uint8(), lines * line_bytes(w))) return false;
      for (int64_t i = 1; i < step.weight_parts(); ++i)
        if (!has(*next++, torch.float32(), groups)) return false;
      if (step.given.bias_type >= 0 && !has(*next++, dtype_of(step.given.bias_type), w.columns)) return false;
    }
    return true;
  }

  static bool has(Tensor tensor, int32_t wanted, int64_t count) {
    int32_t device = -1, dtype = -1;
    bool contiguous = false;
    int64_t dim = 0, *sizes = nullptr;
    if (torch.device_type(tensor, &device) || device != torch.cpu() || torch.dtype(tensor, &dtype) || dtype != wanted) return false;
    if (torch.is_contiguous(tensor, &contiguous) || !contiguous || torch.dim(tensor, &dim) || torch.sizes(tensor, &sizes)) return false;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] < 1 || count % sizes[d]) return false;
      count /= sizes[d];
    }
    return count == 1;
  }

  static int32_t dtype_of(int32_t code) {
    return code == THAL_F32 ? torch.float32() : code == THAL_BF16 ? torch.bfloat16() : torch.float16();
  }
  static int64_t size_of(int32_t code) { return code == THAL_F32 ? 4 : 2; }

  bool compute() {
    static thread_local Workspace memory;  // of results that only later steps read
    uint32_t threads = 1;
    torch.num_threads(&threads);
    std::vector<const void*> results(chain_->steps.size());
    char* inner = static_cast<char*>(memory.get(inner_bytes()));
    if (!inner) return fail("no memory");
    const Tensor* next = handles_.data();
    for (size_t i = 0; i < results.size(); ++i) {
      const ChainStep& step = chain_->steps[i];
      const thal_chain_step& s = step.given;
      void* out = inner;
      if (step.is_read) inner += result_bytes(step);
      else if (!(out = make_result(step))) return fail("no memory for results");
      ChainCall call = {};
      call.a = s.source < 0 ? a_.data : results[static_cast<size_t>(s.source)];
      call.factor = s.factor < 0 ? nullptr : results[static_cast<size_t>(s.factor)];
      call.rows = rows_, call.out = out, call.threads = is_forked() ? 1 : static_cast<int32_t>(std::max(threads, 1u));
      call.data = data(*next++);
      if (step.weight_parts() > 1) call.scale = static_cast<const float*>(data(*next++));
      if (step.weight_parts() > 2) call.zero = static_cast<const float*>(data(*next++));
      if (s.bias_type >= 0) call.bias = data(*next++);
      if (const int code = run_step(*chain_, step, call)) return fail("%s", thal_error_text(code));
      results[i] = out;
    }
    memory.trim();
    return true;
  }

  static const void* data(Tensor tensor) {
    void* found = nullptr;
    torch.data(tensor, &found);
    return found;
  }

  int64_t result_bytes(const ChainStep& step) const {
    return (rows_ * step.given.packed.columns * size_of(step.given.out_type) + 63) / 64 * 64;
  }
  int64_t inner_bytes() const {
    int64_t bytes = 64;
    for (const ChainStep& step : chain_->steps) bytes += step.is_read ? result_bytes(step) : 0;
    return bytes;
  }

  // A contiguous tensor shaped like a, with the columns of the step; its memory.
  void* make_result(const ChainStep& step) {
    std::vector<int64_t> sizes(a_.sizes, a_.sizes + a_.dim), strides(sizes.size(), 1);
    sizes.back() = step.given.packed.columns;
    for (size_t d = sizes.size() - 1; d-- > 0;) strides[d] = strides[d + 1] * sizes[d + 1];
    Tensor made = nullptr;
    void* found = nullptr;
    if (torch.empty(a_.dim, sizes.data(), strides.data(), dtype_of(step.given.out_type), torch.cpu(), 0, &made)) return nullptr;
    torch.data(made, &found);
    return torch.list_append(made_, reinterpret_cast<uint64_t>(made)) ? nullptr : found;
  }
};

}  // namespace

void products_kernel(uint64_t* stack, uint64_t, uint64_t) { Products(stack).run(); }

void products_declined(uint64_t* stack, uint64_t, uint64_t) {
  torch.release(reinterpret_cast<Tensor>(stack[0]));
  torch.release_list(reinterpret_cast<List>(stack[1]));
  List none = nullptr;
  torch.new_list(0, &none);
  stack[0] = reinterpret_cast<uint64_t>(none);
}

}  // namespace thal
