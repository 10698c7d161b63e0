// Keeps chains of products, and runs their steps.
#include "chain.hpp"

#include <mutex>
#include <new>
#include <unordered_map>

namespace thal {
namespace {

std::mutex chains_mutex;
std::unordered_map<int64_t, std::shared_ptr<const Chain>> chains;
int64_t last_chain = 0;

bool is_stored(int32_t type) { return type == THAL_F32 || type == THAL_BF16 || type == THAL_F16; }

// Places of these types in torchhal.pointwise.dtypes.DTYPES.
Type result_type(int32_t type) { return type == THAL_F32 ? Type::kF32 : type == THAL_BF16 ? Type::kBF16 : Type::kF16; }

int check_step(const std::vector<ChainStep>& before, const thal_chain_step& s) {
  const auto count = static_cast<int32_t>(before.size());
  const thal_packed& w = s.packed;
  if (w.scheme < 0 || w.scheme >= THAL_PACKED_SCHEMES || !is_stored(s.b_type) || !is_stored(s.out_type)) return THAL_BAD_DTYPE;
  if (s.bias_type >= 0 && !is_stored(s.bias_type)) return THAL_BAD_DTYPE;
  if (w.transposed || w.rows < 1 || w.columns < 1 || w.rows > INT32_MAX || w.columns > INT32_MAX) return THAL_BAD_SIZE;
  if (w.group < 1 || (is_blocks(w.scheme) && w.rows % kBlockElements)) return THAL_BAD_SIZE;
  if (s.source < -1 || s.source >= count || s.factor < -1 || s.factor >= count) return THAL_BAD_SIZE;
  const auto columns = [&](int32_t step) { return before[static_cast<size_t>(step)].given.packed.columns; };
  if (s.source >= 0 ? columns(s.source) != w.rows : count && before[0].given.packed.rows != w.rows) return THAL_BAD_SIZE;
  if (s.factor >= 0 && (columns(s.factor) != w.columns || !s.words)) return THAL_BAD_SIZE;
  return THAL_OK;
}

int make_chain(const thal_chain_step* steps, int64_t count, int32_t a_type, Chain& made) {
  if (!is_stored(a_type)) return THAL_BAD_DTYPE;
  if (count < 1 || steps[0].source != -1) return THAL_BAD_SIZE;
  made.a_type = a_type;
  for (int64_t i = 0; i < count; ++i) {
    if (const int code = check_step(made.steps, steps[i])) return code;
    for (const int32_t read : {steps[i].source, steps[i].factor})
      if (read >= 0) made.steps[static_cast<size_t>(read)].is_read = true;
    ChainStep step{steps[i], {}};
    if (steps[i].words) step.words.assign(steps[i].words, steps[i].words + steps[i].word_count);
    made.steps.push_back(std::move(step));
  }
  return THAL_OK;
}

}  // namespace

std::shared_ptr<const Chain> find_chain(int64_t id) {
  std::lock_guard<std::mutex> hold(chains_mutex);
  const auto found = chains.find(id);
  return found == chains.end() ? nullptr : found->second;
}

int run_step(const Chain& chain, const ChainStep& step, const ChainCall& call) {
  const thal_chain_step& s = step.given;
  thal_packed packed = s.packed;
  packed.data = call.data, packed.scale = call.scale, packed.zero = call.zero;
  const int64_t sizes[] = {call.rows, packed.columns}, strides[] = {packed.columns, 1};
  thal_captured factor = {call.factor, 0, 2, sizes, strides};
  if (s.factor >= 0) factor.type = static_cast<int32_t>(result_type(chain.steps[static_cast<size_t>(s.factor)].given.out_type));
  const thal_function epilogue = {step.words.data(), static_cast<int64_t>(step.words.size()), &factor, s.factor >= 0 ? 1 : 0};
  const auto type = static_cast<int32_t>(result_type(s.out_type));
  thal_matmul m = {};
  m.struct_size = sizeof(m), m.num_threads = call.threads, m.parallel = thal_torch_parallel;
  m.a_type = s.source < 0 ? chain.a_type : chain.steps[static_cast<size_t>(s.source)].given.out_type;
  m.b_type = s.b_type, m.bias_type = s.bias_type < 0 ? THAL_F32 : s.bias_type;
  m.M = call.rows, m.N = packed.columns, m.K = packed.rows, m.batches = 1;
  m.a = call.a, m.a_stride[0] = packed.rows, m.a_stride[1] = 1;
  m.bias = call.bias, m.bias_stride = 1;
  m.epilogue = step.words.empty() ? nullptr : &epilogue;
  m.outputs = 1, m.out_types = &type, m.out = &call.out, m.packed = &packed;
  return thal_matmul_run(&m);
}

}  // namespace thal

extern "C" int thal_chain_new(const thal_chain_step* steps, int64_t count, int32_t a_type, int64_t* id) {
  if (!steps || !id) return THAL_BAD_POINTER;
  try {
    auto made = std::make_shared<thal::Chain>();
    if (const int code = thal::make_chain(steps, count, a_type, *made)) return code;
    std::lock_guard<std::mutex> hold(thal::chains_mutex);
    thal::chains.emplace(++thal::last_chain, std::move(made));
    *id = thal::last_chain;
    return THAL_OK;
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}

extern "C" void thal_chain_free(int64_t id) {
  std::lock_guard<std::mutex> hold(thal::chains_mutex);
  thal::chains.erase(id);
}
