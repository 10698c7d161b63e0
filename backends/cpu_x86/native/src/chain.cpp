// Reads chains of products, and runs their steps.
#include "chain.hpp"

namespace thal {
namespace {

bool is_stored(int64_t type) { return type == THAL_F32 || type == THAL_BF16 || type == THAL_F16; }
bool is_size(int64_t n) { return n >= 1 && n <= INT32_MAX; }

// Hands numbers out in their order.
class Reader {
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;

 public:
  explicit Reader(const std::vector<int64_t>& numbers) : numbers_(numbers) {}
  size_t left() const { return numbers_.size() - at_; }
  int64_t next() { return numbers_[at_++]; }
  std::vector<int64_t> several(int64_t count) {
    const auto first = numbers_.begin() + static_cast<int64_t>(at_);
    at_ += static_cast<size_t>(count);
    return {first, first + count};
  }
};

bool is_sound(const std::vector<ChainStep>& before, const ChainStep& s) {
  const auto count = static_cast<int64_t>(before.size());
  const thal_packed& w = s.weight;
  if (w.scheme < 0 || w.scheme >= THAL_PACKED_SCHEMES || !is_stored(s.b_type) || !is_stored(s.out_type)) return false;
  if (s.bias_type >= 0 && !is_stored(s.bias_type)) return false;
  if (!is_size(w.rows) || !is_size(w.columns) || w.group < 1 || (is_blocks(w.scheme) && w.rows % kBlockElements)) return false;
  if (s.source < -1 || s.source >= count || s.factor < -1 || s.factor >= count || s.captured < 0) return false;
  const auto step = [&](int64_t i) -> const thal_packed& { return before[static_cast<size_t>(i)].weight; };
  if (s.source >= 0 ? step(s.source).columns != w.rows : count && step(0).rows != w.rows) return false;
  return s.factor < 0 || (step(s.factor).columns == w.columns && !s.captured && !s.words.empty());
}

}  // namespace

bool read_chain(const std::vector<int64_t>& numbers, Chain& chain) {
  constexpr size_t kHead = 3, kFields = 12;
  Reader reader(numbers);
  if (reader.left() < kHead) return false;
  chain.required = reader.next() != 0;
  const int64_t a_type = reader.next(), count = reader.next();
  if (!is_stored(a_type) || count < 1) return false;
  chain.a_type = static_cast<int32_t>(a_type);
  for (int64_t i = 0; i < count; ++i) {
    if (reader.left() < kFields) return false;
    ChainStep s = {};
    s.weight.scheme = static_cast<int32_t>(reader.next());
    s.weight.rows = reader.next(), s.weight.columns = reader.next(), s.weight.group = reader.next();
    s.has_zero = reader.next() != 0;
    s.source = reader.next(), s.factor = reader.next(), s.captured = reader.next();
    s.b_type = static_cast<int32_t>(reader.next()), s.bias_type = static_cast<int32_t>(reader.next());
    s.out_type = static_cast<int32_t>(reader.next());
    const int64_t words = reader.next();
    if (words < 0 || static_cast<uint64_t>(words) > reader.left()) return false;
    s.words = reader.several(words);
    if (!is_sound(chain.steps, s)) return false;
    for (const int64_t read : {s.source, s.factor})
      if (read >= 0) chain.steps[static_cast<size_t>(read)].is_read = true;
    chain.steps.push_back(std::move(s));
  }
  return reader.left() == 0;
}

int32_t result_type(int32_t type) {
  return static_cast<int32_t>(type == THAL_F32 ? Type::kF32 : type == THAL_BF16 ? Type::kBF16 : Type::kF16);
}

int run_step(const Chain& chain, const ChainStep& step, const ChainCall& call) {
  thal_packed packed = step.weight;
  packed.data = call.data, packed.scale = call.scale, packed.zero = call.zero;
  const thal_function epilogue = {step.words.data(), static_cast<int64_t>(step.words.size()), call.captured, call.captured_count};
  const int32_t type = result_type(step.out_type);
  thal_matmul m = {};
  m.struct_size = sizeof(m), m.num_threads = call.threads, m.parallel = thal_torch_parallel;
  m.a_type = step.source < 0 ? chain.a_type : chain.steps[static_cast<size_t>(step.source)].out_type;
  m.b_type = step.b_type, m.bias_type = step.bias_type < 0 ? THAL_F32 : step.bias_type;
  m.M = call.rows, m.N = packed.columns, m.K = packed.rows, m.batches = 1;
  m.a = call.a, m.a_stride[0] = packed.rows, m.a_stride[1] = 1;
  m.bias = call.bias, m.bias_stride = 1;
  m.epilogue = step.words.empty() ? nullptr : &epilogue;
  m.outputs = 1, m.out_types = &type, m.out = &call.out, m.packed = &packed;
  return thal_matmul_run(&m);
}

}  // namespace thal
