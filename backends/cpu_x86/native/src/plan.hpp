// What one attention call becomes before any kernel runs: sizes, tiles, splits and the layout of scratch memory.
#pragma once

#include <cstdint>

#include "torchhal_cpu_x86.h"

namespace thal {

// Keys per block. 120 is a multiple of both micro-kernel heights (12 and 6) and even (bf16 pairs); with a panel of
// 32 query lanes the score block is 15 KB, so it stays in a 32 KB L1 between QK^T, softmax and PV.
constexpr int64_t kKeyBlock = 120;
// Keys per block of the row (decode) kernel: whole vectors of scores, K and V stream through L1 once.
constexpr int64_t kRowKeyBlock = 64;

struct Plan {
  thal_attention call;
  int64_t group;       // query heads per key/value head
  int64_t rows;        // group * L, numbered row = l * group + g, so tiles of rows have narrow causal limits
  int64_t lanes;       // float32 lanes per vector of the chosen instruction set
  int64_t panel;       // query rows per register panel
  int64_t tile_rows;   // query rows per item
  int64_t tiles;       // items per (batch, kv head) and split
  int64_t splits;      // key ranges per tile; depends on sizes only
  int64_t split_keys;  // keys per range
  int64_t items;
  bool row_kernel;     // few query rows: vectors run along the head dimension
  float query_factor;  // multiplied into the query: the sign of the scale, or the scale itself where it is 0 or not finite
  float exp_factor;    // weight = 2^((x - max) * exp_factor) for a score x as kept in the tile
  float score_factor;  // score as kept = dot * score_factor + additive mask
  float lse_factor;    // natural-log score = x * lse_factor

  // Byte offsets inside one thread's scratch.
  int64_t at_q, at_o, at_k, at_v, at_clean, at_scores, at_bias, at_max, at_sum, at_limit, at_rows, scratch_bytes;
  // Partial results of split calls: per item tile_rows x Ev sums, then maxima and weights of the rows.
  int64_t partial_floats;
  char* scratch;
  float* partials;

  float* partial(int64_t item) const { return partials + item * partial_floats; }
};

struct Item {
  int64_t index, b, kv_head, row0, rows, key0, key1;
};

struct Isa {
  int lanes;
  bool bf16_dot;
  void (*run_tile[THAL_DTYPES])(const Plan&, const Item&, char* scratch);
  void (*run_rows[THAL_DTYPES])(const Plan&, const Item&, char* scratch);
  double (*fma_flops)(int64_t loops);  // runs `loops` rounds; returns the FLOPs done
};

extern const Isa kAvx2;
extern const Isa kAvx512;
extern const Isa kAvx512Bf16;

const Isa* find_isa(int32_t isa);  // null when unsupported here
int64_t make_plan(const thal_attention& call, Plan& plan);  // workspace bytes, or -code

}  // namespace thal
