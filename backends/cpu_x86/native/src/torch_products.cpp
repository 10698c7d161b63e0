// The dispatcher operator torchhal_cpu_x86::products: a chain of products on one tensor that is plain memory.
//
// Weights and biases come with each call, so that whoever moves or replaces one is never read from where it was. What is not
// as the chain says gives no results: nothing is written then, and the caller looks closer.
#include <algorithm>
#include <new>
#include <unordered_map>

#include "chain.hpp"
#include "torch_call.hpp"

namespace thal {
namespace {

// What this thread has read; models have few different layers. Null where the text is no chain.
const Chain* chain_of(const char* text, size_t size) {
  static thread_local std::unordered_map<std::string, Chain> known;
  std::string key(text, size);
  const auto found = known.find(key);
  if (found != known.end()) return &found->second;
  std::vector<int64_t> numbers;
  Chain chain;
  if (!parse_numbers(text, size, numbers) || !read_chain(numbers, chain)) return nullptr;
  if (known.size() >= 256) known.clear();
  return &known.emplace(std::move(key), std::move(chain)).first->second;
}

class Products : TorchCall {
  enum { kA, kParts, kChain };

  List parts_, made_ = nullptr;
  String text_;
  const Chain* chain_ = nullptr;
  std::vector<Tensor> handles_;  // of the parts
  std::vector<thal_captured> captured_;
  View a_;
  int64_t rows_ = 1;

 public:
  explicit Products(uint64_t* stack)
      : TorchCall(stack, "products"), parts_(reinterpret_cast<List>(stack[kParts])), text_(reinterpret_cast<String>(stack[kChain])) {}

  void run() {
    bool ok = false;
    try {
      ok = open() && (fits() ? compute() : !chain_->required || fail("an operand is not as the chain says: %s", std::string(message_).c_str()));
    } catch (const std::bad_alloc&) {
      fail("no memory");
    }
    for (Tensor t : handles_) torch.release(t);
    torch.release(tensor(kA));
    torch.release_list(parts_);
    torch.release_string(text_);
    if (ok) {
      stack_[0] = reinterpret_cast<uint64_t>(made_);
      return;
    }
    if (made_) torch.release_list(made_);
    torch.check(false, "products", "torchhal_cpu_x86", 0, message_);
  }

 private:
  bool open() {
    size_t size = 0, count = 0;
    const char* text = nullptr;
    if (torch.string_size(text_, &size) || torch.string_text(text_, &text)) return fail("chain cannot be read");
    if (!(chain_ = chain_of(text, size))) return fail("chain is none: %.200s", text);
    int64_t wanted = 0;
    for (const ChainStep& step : chain_->steps) wanted += step.parts();
    if (torch.list_size(parts_, &count)) return fail("parts cannot be read");
    handles_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      uint64_t item = 0;
      if (torch.list_item(parts_, i, &item)) return fail("parts cannot be read");
      handles_.push_back(reinterpret_cast<Tensor>(item));
    }
    if (static_cast<int64_t>(count) != wanted)
      return fail("the chain takes %lld parts, got %lld", static_cast<long long>(wanted), static_cast<long long>(count));
    return torch.new_list(0, &made_) == 0 || fail("no memory");
  }

  // ------------------------------------------------------------------------ whether the tensors are as the chain says

  bool fits() {
    bool contiguous = false;
    if (!read(tensor(kA), "a", 1, 64, a_)) return false;
    if (code_of(a_.dtype) != chain_->a_type) return fail("a has another dtype");
    if (torch.is_contiguous(tensor(kA), &contiguous) || !contiguous) return fail("a is not contiguous");
    for (int64_t d = 0; d + 1 < a_.dim; ++d) rows_ *= a_.sizes[d];
    if (a_.sizes[a_.dim - 1] != chain_->steps[0].weight.rows || rows_ > INT32_MAX) return fail("a has another size");
    const Tensor* next = handles_.data();
    for (const ChainStep& step : chain_->steps) {
      const thal_packed& w = step.weight;
      const bool halves = w.scheme == THAL_PACKED_I4;
      const int64_t lines = is_blocks(w.scheme) ? w.columns : halves ? (w.rows + 1) / 2 : w.rows;
      const int64_t groups = ((w.rows - 1) / w.group + 1) * w.columns;
      if (!is_plain(*next++, w.scheme == THAL_PACKED_I8 ? torch.int8() : torch.uint8(), lines * line_bytes(w))) return false;
      for (int64_t i = 1; i < step.weight_parts(); ++i)
        if (!is_plain(*next++, torch.float32(), groups)) return false;
      if (step.bias_type >= 0 && !is_plain(*next++, dtype_of(step.bias_type), w.columns)) return false;
      for (int64_t i = 0; i < step.captured; ++i)
        if (!read_captured(*next++)) return false;
    }
    return true;
  }

  // So many elements of a type, side by side on the CPU.
  bool is_plain(Tensor tensor, int32_t wanted, int64_t count) {
    bool contiguous = false;
    View v;
    if (!read(tensor, "a part", 1, 64, v)) return false;
    if (v.dtype != wanted || torch.is_contiguous(tensor, &contiguous) || !contiguous) return fail("a part has another dtype or strides");
    int64_t found = 1;
    for (int64_t d = 0; d < v.dim; ++d) found *= v.sizes[d];
    return found == count || fail("a part has another size");
  }

  bool read_captured(Tensor tensor) {
    View v;
    if (!read(tensor, "a captured tensor", 0, 16, v)) return false;
    const int32_t type = type_of(v.dtype);
    if (type < 0) return fail("a captured tensor has a dtype that programs do not read");
    captured_.push_back({v.data, type, static_cast<int32_t>(v.dim), v.sizes, v.strides});
    return true;
  }

  static int32_t dtype_of(int32_t code) {
    return code == THAL_F32 ? torch.float32() : code == THAL_BF16 ? torch.bfloat16() : torch.float16();
  }

  // ------------------------------------------------------------------------ results

  bool compute() {
    static thread_local Workspace memory;  // of results that only later steps read
    uint32_t threads = 1;
    torch.num_threads(&threads);
    std::vector<const void*> results(chain_->steps.size());
    char* inner = static_cast<char*>(memory.get(inner_bytes()));
    if (!inner) return fail("no memory");
    const Tensor* next = handles_.data();
    const thal_captured* captured = captured_.data();
    for (size_t i = 0; i < results.size(); ++i) {
      const ChainStep& step = chain_->steps[i];
      void* out = inner;
      if (step.is_read) inner += result_bytes(step);
      else if (!make_result(step, &out)) return fail("no memory for results");
      results[i] = out;
      ChainCall call = {};
      call.a = step.source < 0 ? a_.data : results[static_cast<size_t>(step.source)];
      call.rows = rows_, call.out = out, call.threads = is_forked() ? 1 : static_cast<int32_t>(std::max(threads, 1u));
      call.data = data(*next++);
      if (step.weight_parts() > 1) call.scale = static_cast<const float*>(data(*next++));
      if (step.weight_parts() > 2) call.zero = static_cast<const float*>(data(*next++));
      if (step.bias_type >= 0) call.bias = data(*next++);
      call.captured = captured, call.captured_count = step.captured;
      captured += step.captured, next += step.captured;
      const int64_t sizes[] = {rows_, step.weight.columns}, strides[] = {step.weight.columns, 1};
      thal_captured factor = {nullptr, 0, 2, sizes, strides};
      if (step.factor >= 0) {
        const auto at = static_cast<size_t>(step.factor);
        factor.data = results[at], factor.type = result_type(chain_->steps[at].out_type);
        call.captured = &factor, call.captured_count = 1;
      }
      if (const int code = rows_ ? run_step(*chain_, step, call) : THAL_OK) return fail("%s", thal_error_text(code));
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
    return (rows_ * step.weight.columns * (step.out_type == THAL_F32 ? 4 : 2) + 63) / 64 * 64;
  }
  int64_t inner_bytes() const {
    int64_t bytes = 64;
    for (const ChainStep& step : chain_->steps) bytes += step.is_read ? result_bytes(step) : 0;
    return bytes;
  }

  // A contiguous tensor shaped like a, with the columns of the step.
  bool make_result(const ChainStep& step, void** out) {
    std::vector<int64_t> sizes(a_.sizes, a_.sizes + a_.dim), strides(sizes.size(), 1);
    sizes.back() = step.weight.columns;
    for (size_t d = sizes.size() - 1; d-- > 0;) strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
    Tensor made = nullptr;
    if (torch.empty(a_.dim, sizes.data(), strides.data(), dtype_of(step.out_type), torch.cpu(), 0, &made)) return false;
    return !torch.data(made, out) && !torch.list_append(made_, reinterpret_cast<uint64_t>(made));
  }
};

}  // namespace

void products_kernel(uint64_t* stack, uint64_t, uint64_t) { Products(stack).run(); }

// Nothing, which whoever requires results takes for an error.
void products_declined(uint64_t* stack, uint64_t, uint64_t) {
  torch.release(reinterpret_cast<Tensor>(stack[0]));
  torch.release_list(reinterpret_cast<List>(stack[1]));
  torch.release_string(reinterpret_cast<String>(stack[2]));
  List none = nullptr;
  torch.new_list(0, &none);
  stack[0] = reinterpret_cast<uint64_t>(none);
}

}  // namespace thal
