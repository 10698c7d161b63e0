// What one attention call becomes before any kernel runs: sizes, tiles, splits and the layout of scratch memory.
#pragma once

#include <cstdint>

#include "panel_source.hpp"
#include "program.hpp"

namespace thal {

// Keys per block. 120 is a multiple of both micro-kernel heights (12 and 6) and even (bf16 pairs); with a panel of
// 32 query lanes the score block is 15 KB, so it stays in a 32 KB L1 between QK^T, softmax and PV.
constexpr int64_t kKeyBlock = 120;
// Keys per block where products are of tiles: whole tiles of keys, and a score block of 16 KB.
constexpr int64_t kTileKeyBlock = 128;
// Keys per block of the row (decode) kernel: whole vectors of scores, K and V stream through L1 once.
constexpr int64_t kRowKeyBlock = 64;

// Panels of the largest tile: 128 rows, or 64 of a wide head, in panels of 8 rows or more.
constexpr int64_t kPanelsMost = 16;

struct Isa;

inline int64_t bytes_of(int32_t dtype) { return dtype == THAL_F64 ? 8 : dtype == THAL_F32 ? 4 : 2; }

// Hands out parts of a piece of memory, each aligned to a cache line.
struct Scratch {
  int64_t at = 0;
  int64_t take(int64_t bytes) {
    const int64_t here = at;
    at += (bytes + 63) / 64 * 64;
    return here;
  }
};

// One sequence of a call: its lengths, where its tensors begin, and its share of the items.
struct Sequence {
  int64_t b, L, S;
  int64_t first;                  // position of query row 0: what a score_mod is told, and what is_causal compares
  int64_t q, k, v, out, lse, mask;  // elements from the tensors' beginnings
  int64_t first_q, first_k;         // of packed sequences: the first tokens
  int64_t tiles, splits;            // items for each kv head: tiles * splits
  int64_t item0, part0, partial0;   // numbers of its first item, first part (all splits of a tile) and first partial
};

struct Plan {
  // Rows of a tile as columns of a panel: where they lie, and what they are multiplied by.
  struct Panel {
    const void* data;
    const int64_t* stride;
    int64_t columns;
    double factor;
  };

  thal_attention call;
  const Isa* isa;
  int64_t group;       // query heads per key/value head
  int64_t most_rows;   // of a sequence: group * L, numbered row = l * group + g, so tiles have narrow causal limits
  int64_t most_keys;
  int64_t lanes;       // lanes per vector of the chosen instruction set
  int64_t panel;       // query rows per register panel
  int64_t tile_rows;   // query rows per item
  int32_t stored_type;  // of keys and values: the call's dtype, or that of quantised ones
  int64_t split_keys;  // keys per item, where a tile's keys are split; depends on sizes only
  int64_t items, parts;
  bool whole_rows = false;  // set before planning: tiles alone, each with all its keys, as gradients need them
  bool row_kernel;     // few query rows: vectors run along the head dimension
  int64_t real;          // bytes of the float32 or float64 that is computed with
  double scale;          // the call's, as it is computed with, and so are the factors
  double query_factor;  // multiplied into the query: the sign of the scale, or the scale itself where it is 0 or not finite
  double exp_factor;   // weight = 2^((x - max) * exp_factor) for a score x as kept in the tile
  double exp_rest;       // what rounding took from exp_factor, of float64
  double score_factor;  // score as kept = dot * score_factor + additive mask
  double lse_factor;   // natural-log score = x * lse_factor
  Program score_mod, mask_mod;
  bool has_score_mod, has_mask_mod;

  // One for each sequence of a ragged call. Of any other call one that stands for all: they differ in b and offsets.
  std::vector<Sequence> ragged;
  Sequence uniform;
  Sequence* sequences() { return call.ragged ? ragged.data() : &uniform; }
  const Sequence* sequences() const { return call.ragged ? ragged.data() : &uniform; }
  int64_t sequence_count() const { return call.ragged ? static_cast<int64_t>(ragged.size()) : 1; }

  // Byte offsets inside one thread's scratch.
  int64_t at_q, at_o, at_k, at_v, at_clean, at_scores, at_bias, at_max, at_sum, at_limit, at_rows;
  int64_t at_program, at_visible, at_heads, at_positions, at_key_index, at_blocks, at_stage_k, at_stage_v;
  int64_t scratch_bytes;
  // Partial results of split tiles: per item tile_rows x Ev sums, then maxima and weights of the rows.
  int64_t partial_bytes, partial_count;
  char* scratch;
  char* partials;

  bool packed() const { return call.ragged && !call.ragged->lengths; }
  bool paged() const { return call.ragged && call.ragged->lengths; }
  // What finished sums are multiplied with, beside the inverse of the weights' sum.
  double kept() const { return call.dropout ? call.dropout->kept : 1.0; }
  bool needs_indices() const { return has_score_mod || has_mask_mod || call.dropout; }
  bool asks() const { return has_mask_mod || call.blocks; }  // whether keys are hidden by a function or a BlockMask
};

struct Item {
  int64_t b, kv_head, row0, rows, key0, key1;
  Sequence sequence;
  char* partial;  // null unless the tile's keys are split
};

struct GradientPlan;
struct GradientItem;
struct MapPlan;
union Partial;
struct MatmulPlan;
struct MatmulTile;
struct MatmulBlock;
struct SkinnyPart;

// The parts of a fused matrix product, computed with float32 or float64; matmul.hpp says what they work on.
struct MatmulKernels {
  int64_t panel_rows, panel_columns;
  void (*pack_left)(const MatmulPlan&, const MatmulBlock&, void* panels, char* scratch);
  void (*pack_right)(const MatmulPlan&, const MatmulBlock&, void* panels, char* scratch);
  void (*run_tile)(const MatmulPlan&, const MatmulTile&, char* scratch);
  PanelSource (*source)(const MatmulPlan&);  // of b
};

// The parts of a product of few rows with a packed weight; packed.hpp says what they work on.
struct SkinnyKernels {
  void (*pack_rows)(const MatmulPlan&, int64_t batch, float* rows, int64_t pitch, char* scratch);
  void (*sum_part)(const MatmulPlan&, const SkinnyPart&, char* scratch);
  void (*finish)(const MatmulPlan&, const MatmulTile&, float* tile, char* scratch);
};

struct Isa {
  int lanes;
  int64_t key_block;     // kKeyBlock or kTileKeyBlock
  int64_t score_blocks;  // in use at once
  bool bf16_pairs;       // gradients and matrix products of bf16 come from products of pairs
  void (*run_tile[THAL_DTYPES])(const Plan&, const Item&, char* scratch);
  void (*run_rows[THAL_STORED_TYPES])(const Plan&, const Item&, char* scratch);
  double (*fma_flops)(int64_t loops);  // runs `loops` rounds; returns the FLOPs done
  void (*run_program)(const Program&, const Frame&);
  void (*run_gradient[THAL_DTYPES])(const GradientPlan&, const GradientItem&, char* scratch);
  void (*store_key_gradients[THAL_DTYPES])(const GradientPlan&, const GradientItem&, const void* sums);
  void (*run_map)(const MapPlan&, int64_t position, int64_t first, int64_t count, char* scratch);
  void (*reduce_map)(const MapPlan&, int64_t position, int64_t first, int64_t count, char* scratch, Partial* partials);
  MatmulKernels matmul[3];  // of float32, of float64, and of bf16 pairs where bf16_pairs says so
  SkinnyKernels skinny;
};

extern const Isa kAvx2;
extern const Isa kAvx512;
extern const Isa kAvx512Bf16;
void run_amx_bf16(const Plan&, const Item&, char* scratch);  // what AMX has of its own: run_tile of bf16

const Isa* find_isa(int32_t isa);  // null when unsupported here
int64_t make_plan(const thal_attention& call, Plan& plan);  // workspace bytes, or -code; may throw std::bad_alloc
int make_sequences(Plan& plan);                             // lengths and offsets of each sequence
void number_items(Plan& plan);                              // once tiles and splits are known
Sequence sequence_of(const thal_attention& call, int64_t b);  // of a dense call
// The last sequence whose number `first` is at most `index`, and has items.
const Sequence& sequence_at(const Plan& plan, int64_t index, int64_t Sequence::*first);
Item item_at(const Plan& plan, int64_t index);
Item part_at(const Plan& plan, int64_t part);  // the first split of a tile
int run_plan(Plan& plan, void* workspace);     // of as many bytes as make_plan said
double work_of(const Plan& plan);              // multiply-adds if every query saw every key

// Below this many multiply-adds (about 10 us on one core) waking other threads costs more than it brings.
constexpr double kSerialWork = 5e5;

}  // namespace thal
