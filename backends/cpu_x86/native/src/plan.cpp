// Checks one call and lays it out: tiles, key splits, scratch memory.
#include "plan.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace thal {
namespace {

std::atomic<int32_t> chosen[THAL_DTYPES];

int32_t widest() {
  for (int32_t isa = THAL_ISAS - 1; isa > THAL_ISA_AUTO; --isa)
    if (find_isa(isa)) return isa;
  return THAL_ISA_AUTO;
}

int check(const thal_attention& c) {
  if (c.dtype < 0 || c.dtype >= THAL_DTYPES || c.mask_kind < 0 || c.mask_kind > THAL_MASK_F16) return THAL_BAD_DTYPE;
  if (c.B < 0 || c.Hq < 0 || c.Hkv < 0 || c.L < 0 || c.S < 0 || c.E < 1 || c.Ev < 0) return THAL_BAD_SIZE;
  if (c.Hkv ? c.Hq % c.Hkv : c.Hq) return THAL_BAD_SIZE;
  if (c.S > INT32_MAX || c.L > INT32_MAX) return THAL_BAD_SIZE;  // causal limits are kept in 32 bits
  if (c.num_threads < 1 || (c.num_threads > 1 && !c.parallel)) return THAL_BAD_THREADS;
  return THAL_OK;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void set_factors(Plan& p) {
  const thal_attention& c = p.call;
  const double log2e = 1.4426950408889634;
  const bool additive = c.mask_kind > THAL_MASK_BOOL;
  const float size = std::fabs(c.scale);
  const bool plain = std::isfinite(c.scale) && size * 1.4426950f >= 1.1754944e-38f && std::isfinite(size * 1.4426951f);
  // A positive factor keeps the order of scores, so the sign of the scale goes into the query, which is exact.
  p.query_factor = plain ? (c.scale < 0 ? -1.0f : 1.0f) : c.scale;
  p.score_factor = additive && plain ? size : 1.0f;
  p.lse_factor = plain && !additive ? size : 1.0f;
  p.exp_factor = static_cast<float>(p.lse_factor * log2e);
}

void set_tiles(Plan& p, const Isa& isa) {
  const thal_attention& c = p.call;
  p.lanes = isa.lanes;
  p.group = c.Hkv ? c.Hq / c.Hkv : 0;
  p.rows = p.group * c.L;
  // Up to half a vector of rows, filling lanes with rows would waste more than sums along the head dimension cost.
  p.row_kernel = p.rows <= p.lanes / 2;
  p.panel = p.rows <= p.lanes ? p.lanes : 2 * p.lanes;
  // 128 rows share each pass over keys and values; query and sums of 128 rows fill half an L2 at E = Ev = 192.
  const int64_t most = c.E + c.Ev > 384 ? 64 : 128;
  p.tile_rows = p.row_kernel ? std::max<int64_t>(p.rows, 1) : std::min(most, ceil_div(p.rows, p.panel) * p.panel);
  p.tiles = ceil_div(p.rows, p.tile_rows);
  const int64_t parts = c.B * c.Hkv * p.tiles;
  // About 64 items keep many cores busy; a range below 512 keys would not pay for merging.
  const int64_t wanted = parts > 0 ? std::min(ceil_div(64, parts), std::max<int64_t>(1, c.S / 512)) : 1;
  const int64_t block = p.row_kernel ? kRowKeyBlock : kKeyBlock;
  p.split_keys = std::max<int64_t>(ceil_div(ceil_div(c.S, wanted), block) * block, 1);
  p.splits = std::max<int64_t>(1, ceil_div(c.S, p.split_keys));
  p.items = parts * p.splits;
  p.partial_floats = p.splits > 1 ? ceil_div(p.tile_rows * (c.Ev + 2), 16) * 16 : 0;
}

void set_scratch(Plan& p) {
  const thal_attention& c = p.call;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += ceil_div(bytes, 64) * 64;
    return here;
  };
  const int64_t width = ceil_div(c.E, p.lanes) * p.lanes, value_width = ceil_div(c.Ev, p.lanes) * p.lanes;
  const int64_t block = p.row_kernel ? kRowKeyBlock : kKeyBlock;
  const int64_t rows = p.row_kernel ? p.tile_rows : ceil_div(p.tile_rows, p.panel) * p.panel;
  const int64_t lanes = p.row_kernel ? 2 * p.tile_rows : p.panel;
  p.at_q = take(rows * width * 4);
  p.at_o = take(rows * value_width * 4);
  p.at_k = take(block * width * 4);
  p.at_v = take(block * value_width * 4);
  p.at_clean = take(p.row_kernel ? 0 : block * value_width * 4);
  p.at_scores = take(block * lanes * 4);
  p.at_bias = take(p.row_kernel ? 0 : block * lanes * 4);
  p.at_max = take(rows * 4);
  p.at_sum = take(rows * 4);
  p.at_limit = take(rows * 4);
  p.at_rows = take(p.lanes * (std::max(c.E, c.Ev) + 1) * 4);
  p.scratch_bytes = at;
}

}  // namespace

int64_t make_plan(const thal_attention& call, Plan& p) {
  if (call.struct_size != sizeof(thal_attention)) return -THAL_BAD_STRUCT;
  if (const int code = check(call)) return -code;
  const int32_t isa = call.isa == THAL_ISA_AUTO ? thal_get_isa(call.dtype) : call.isa;
  const Isa* found = find_isa(isa);
  if (!found) return -THAL_BAD_ISA;
  p.call = call;
  p.call.isa = isa;
  set_factors(p);
  set_tiles(p, *found);
  set_scratch(p);
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(call.num_threads, p.items));
  return 64 + workers * p.scratch_bytes + (p.splits > 1 ? p.items * p.partial_floats * 4 : 0);
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
  thal::Plan plan;
  return thal::make_plan(*call, plan);
}

extern "C" int32_t thal_interface_version(void) { return THAL_INTERFACE_VERSION; }

extern "C" const char* thal_error_text(int code) {
  switch (code) {
    case THAL_OK:
      return "no error";
    case THAL_BAD_STRUCT:
      return "the descriptor's struct_size differs from this library's: header and library do not match";
    case THAL_BAD_DTYPE:
      return "unknown dtype or mask kind";
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
    case THAL_NO_MEMORY:
      return "out of memory";
    default:
      return "unknown error code";
  }
}
