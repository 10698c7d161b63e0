// Checks one call and lays it out: tiles, key splits, scratch memory.
#include "plan.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

namespace thal {
namespace {

std::atomic<int32_t> chosen[THAL_DTYPES];

int32_t widest() {
  for (int32_t isa = THAL_ISAS - 1; isa > THAL_ISA_AUTO; --isa)
    if (find_isa(isa)) return isa;
  return THAL_ISA_AUTO;
}

int check(const thal_attention& c) {
  if (c.dtype < 0 || c.dtype >= THAL_DTYPES || c.mask_kind < 0 || c.mask_kind > THAL_MASK_F64) return THAL_BAD_DTYPE;
  if (c.B < 0 || c.Hq < 0 || c.Hkv < 0 || c.L < 0 || c.S < 0 || c.E < 1 || c.Ev < 0) return THAL_BAD_SIZE;
  if (c.Hkv ? c.Hq % c.Hkv : c.Hq) return THAL_BAD_SIZE;
  if (c.S > INT32_MAX || c.L > INT32_MAX) return THAL_BAD_SIZE;  // causal limits are kept in 32 bits
  if (c.mask_kind == THAL_MASK_F64 && c.dtype != THAL_F64) return THAL_BAD_DTYPE;
  if (c.dropout && c.dropout->threshold > uint64_t{1} << 32) return THAL_BAD_SIZE;
  if (c.quantized && !(c.ragged && c.ragged->lengths)) return THAL_BAD_DTYPE;
  if (c.quantized && c.quantized->type != THAL_I8 && c.quantized->type != THAL_F8) return THAL_BAD_DTYPE;
  if (c.num_threads < 1 || (c.num_threads > 1 && !c.parallel)) return THAL_BAD_THREADS;
  return THAL_OK;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int decode_one(const thal_function& f, const Span* spans, int64_t inputs, Type wanted, Program& program) {
  if (const int code = decode(f.words, f.count, spans, inputs, wanted, program)) return code;
  for (int64_t i = 0; i < inputs; ++i)  // a score_mod's first input is the score, and all others are indices
    if (program.inputs[i] != (inputs == 5 && i == 0 ? wanted : Type::kI32)) return THAL_BAD_PROGRAM;
  return fit(program, f.captured, f.captured_count) ? THAL_OK : THAL_BAD_PROGRAM;
}

// Of each row of the item: one byte for each key block, one more row for positions before 0, and their summary.
int64_t block_table_bytes(const Plan& p, int64_t rows) {
  return (rows + 2) * ceil_div(std::max<int64_t>(p.most_keys, 1), p.call.blocks->block_keys);
}

// The inputs of a score_mod, or all but the first of a mask_mod. The tile kernel's lanes are query rows and its rows are
// keys; the row kernel's lanes are keys, and each of its rows is a part of a query row.
int decode_functions(Plan& p) {
  const thal_attention& c = p.call;
  const Span tile[] = {Span::kBlock, Span::kOne, Span::kLanes, Span::kLanes, Span::kRows};
  const Span row[] = {Span::kBlock, Span::kOne, Span::kRows, Span::kRows, Span::kBlock};
  const Span* spans = p.row_kernel ? row : tile;
  int code = THAL_OK;
  if (p.has_score_mod) code = decode_one(*c.score_mod, spans, 5, c.dtype == THAL_F64 ? Type::kF64 : Type::kF32, p.score_mod);
  if (!code && p.has_mask_mod) code = decode_one(*c.mask_mod, spans + 1, 4, Type::kBool, p.mask_mod);
  return code;
}

// In the precision of the kernels: as float or double.
template <class T>
void set_factors(Plan& p) {
  const thal_attention& c = p.call;
  constexpr T log2e = static_cast<T>(1.4426950408889634), least = std::numeric_limits<T>::min();
  const T scale = static_cast<T>(c.scale), size = std::fabs(scale);
  const bool natural = c.mask_kind > THAL_MASK_BOOL || p.has_score_mod;  // the scores themselves are needed
  const bool plain = std::isfinite(scale) && size * log2e >= least && std::isfinite(size * log2e);
  p.scale = scale;
  // A positive factor keeps the order of scores, so the sign of the scale goes into the query, which is exact.
  p.query_factor = p.has_score_mod ? T(1) : plain ? (scale < 0 ? T(-1) : T(1)) : scale;
  p.score_factor = natural && plain && !p.has_score_mod ? size : T(1);
  const T lse_factor = plain && !natural ? size : T(1);
  p.lse_factor = lse_factor;
  p.exp_factor = static_cast<T>(static_cast<double>(lse_factor) * 1.4426950408889634);
  constexpr double kRest = 2.0355273740931033e-17;  // log2(e) less the double next to it
  p.exp_rest = std::fma(static_cast<double>(lse_factor), 1.4426950408889634, -p.exp_factor) + lse_factor * kRest;
}

void set_tiles(Plan& p) {
  const thal_attention& c = p.call;
  p.lanes = c.dtype == THAL_F64 ? p.isa->lanes / 2 : p.isa->lanes;
  // Up to half a vector of rows, filling lanes with rows would waste more than sums along the head dimension cost.
  p.row_kernel = p.most_rows <= p.lanes / 2 && !p.whole_rows && c.dtype != THAL_F64;
  p.panel = p.most_rows <= p.lanes ? p.lanes : 2 * p.lanes;
  // The machine for captured functions, and the generator of dropout, work on 16 lanes.
  if (p.needs_indices() || p.asks()) p.panel = std::max(p.panel, kLanes);
  // 128 rows share each pass over keys and values; query and sums of 128 rows fill half an L2 at E = Ev = 192.
  const int64_t most = c.E + c.Ev > 384 ? 64 : 128;
  p.tile_rows = p.row_kernel ? std::max<int64_t>(p.most_rows, 1) : std::min(most, std::max<int64_t>(1, ceil_div(p.most_rows, p.panel)) * p.panel);
  int64_t parts = 0;
  for (int64_t i = 0; i < p.sequence_count(); ++i)
    parts += (c.ragged ? 1 : c.B) * c.Hkv * ceil_div(p.sequences()[i].L * p.group, p.tile_rows);
  // About 64 items keep many cores busy; a range below 512 keys would not pay for merging.
  const int64_t wanted = parts > 0 && !p.whole_rows ? std::min(ceil_div(64, parts), std::max<int64_t>(1, p.most_keys / 512)) : 1;
  const int64_t block = p.row_kernel ? kRowKeyBlock : p.isa->key_block;
  p.split_keys = std::max<int64_t>(ceil_div(ceil_div(p.most_keys, wanted), block) * block, 1);
}

void set_scratch(Plan& p) {
  const thal_attention& c = p.call;
  Scratch layout;
  const int64_t real = p.real;
  const auto take = [&layout](int64_t bytes) { return layout.take(bytes); };
  const int64_t width = ceil_div(c.E, p.lanes) * p.lanes, value_width = ceil_div(c.Ev, p.lanes) * p.lanes;
  const int64_t block = p.row_kernel ? kRowKeyBlock : p.isa->key_block;
  const int64_t rows = p.row_kernel ? p.tile_rows : ceil_div(p.tile_rows, p.panel) * p.panel;
  const int64_t lanes = p.row_kernel ? 2 * p.tile_rows : p.panel;
  p.at_q = take(rows * width * real);
  p.at_o = take(rows * (p.whole_rows ? width : value_width) * real);
  p.at_k = take(block * width * real);
  p.at_v = take(block * value_width * real);
  p.at_clean = take(p.row_kernel || p.whole_rows ? 0 : block * value_width * real);
  p.at_scores = take((p.row_kernel ? 1 : p.isa->score_blocks) * block * lanes * real);
  p.at_bias = take(p.row_kernel ? 0 : block * lanes * real);
  p.at_max = take(rows * real);
  p.at_sum = take(rows * real);
  p.at_limit = take(rows * real);
  p.at_rows = take(p.lanes * (std::max(c.E, c.Ev) + 1) * real);
  const bool functions = p.needs_indices();
  p.at_program = take(std::max(p.score_mod.bytes, p.mask_mod.bytes));
  p.at_visible = take(p.asks() ? block * lanes * 4 : 0);
  p.at_heads = take(functions ? 4 * rows * 4 : 0);
  p.at_positions = take(functions ? 4 * rows * 4 : 0);
  p.at_key_index = take(functions ? (p.row_kernel ? block * rows : ceil_div(block, kLanes) * kLanes) * 4 : 0);
  p.at_blocks = take(c.blocks ? block_table_bytes(p, rows) : 0);
  const bool staged = c.ragged && c.ragged->lengths && !p.row_kernel;
  const int64_t size = c.quantized ? real : bytes_of(c.dtype);  // quantised rows are dequantised there
  p.at_stage_k = take(staged ? block * c.E * size : 0);
  p.at_stage_v = take(staged ? block * c.Ev * size : 0);
  p.scratch_bytes = layout.at;
}

}  // namespace

int64_t make_plan(const thal_attention& call, Plan& p) {
  if (call.struct_size != sizeof(thal_attention)) return -THAL_BAD_STRUCT;
  if (const int code = check(call)) return -code;
  const int32_t isa = call.isa == THAL_ISA_AUTO ? thal_get_isa(call.dtype) : call.isa;
  p.isa = find_isa(isa);
  if (!p.isa) return -THAL_BAD_ISA;
  p.call = call;
  p.call.isa = isa;
  p.real = call.dtype == THAL_F64 ? 8 : 4;
  p.stored_type = call.quantized ? call.quantized->type : call.dtype;
  p.group = call.Hkv ? call.Hq / call.Hkv : 0;
  p.has_score_mod = call.score_mod, p.has_mask_mod = call.mask_mod;
  if (const int code = make_sequences(p)) return -code;
  call.dtype == THAL_F64 ? set_factors<double>(p) : set_factors<float>(p);
  set_tiles(p);
  if (const int code = decode_functions(p)) return -code;
  number_items(p);
  set_scratch(p);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(call.num_threads, p.items));
  return 64 + workers * p.scratch_bytes + p.partial_count * p.partial_bytes;
}

}  // namespace thal

extern "C" int thal_set_isa(int32_t dtype, int32_t isa) {
  if (dtype < 0 || dtype >= THAL_DTYPES) return THAL_BAD_DTYPE;
  if (isa != THAL_ISA_AUTO && !thal::find_isa(isa)) return THAL_BAD_ISA;
  thal::chosen[dtype].store(isa, std::memory_order_relaxed);
  return THAL_OK;
}

extern "C" int32_t thal_get_isa(int32_t dtype) {
  if (dtype < 0 || dtype >= THAL_DTYPES) return THAL_ISA_AUTO;
  const int32_t isa = thal::chosen[dtype].load(std::memory_order_relaxed);
  return isa == THAL_ISA_AUTO ? thal::widest() : isa;
}

extern "C" int64_t thal_attention_workspace(const thal_attention* call) {
  if (!call) return -THAL_BAD_POINTER;
  try {
    thal::Plan plan;
    return thal::make_plan(*call, plan);
  } catch (const std::bad_alloc&) {
    return -THAL_NO_MEMORY;
  }
}

extern "C" int32_t thal_interface_version(void) { return THAL_INTERFACE_VERSION; }

extern "C" const char* thal_error_text(int code) {
  switch (code) {
    case THAL_OK:
      return "no error";
    case THAL_BAD_STRUCT:
      return "the descriptor's struct_size differs from this library's: header and library do not match";
    case THAL_BAD_DTYPE:
      return "unknown dtype or mask kind, or quantised keys that lie in no pages";
    case THAL_BAD_ISA:
      return "unknown instruction set, or one this CPU or operating system does not support";
    case THAL_BAD_SIZE:
      return "sizes must not be negative, E at least 1, and Hq a multiple of Hkv";
    case THAL_BAD_POINTER:
      return "a tensor that has elements was given a null pointer";
    case THAL_BAD_WORKSPACE:
      return "the workspace is smaller than thal_attention_workspace asks for";
    case THAL_BAD_THREADS:
      return "num_threads must be at least 1, and above 1 needs a parallel callback";
    case THAL_PARALLEL_FAILED:
      return "the parallel callback reported failure";
    case THAL_BAD_PROGRAM:
      return "not a program of this version, or operands that do not fit it";
    case THAL_BAD_LENGTHS:
      return "cumulative lengths must start at 0, never decrease and end at the number of tokens, and lengths must fit "
             "the page table";
    case THAL_BAD_PAGES:
      return "a used entry of the page table names a page that does not exist";
    case THAL_BAD_BLOCKS:
      return "the BlockMask must cover every query position, be for 1 or Hq heads and for 1 or B sequences";
    case THAL_NO_MEMORY:
      return "out of memory";
    default:
      return "unknown error code";
  }
}
