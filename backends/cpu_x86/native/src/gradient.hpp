// What the gradients of one attention call become before any kernel runs.
#pragma once

#include "plan.hpp"

namespace thal {

// Keys beyond the last that a group of rows of the products may touch.
constexpr int64_t kSpareKeys = 12;

// The call's tiles are computed again, whole rows at a time: an item is a range of tiles of one key head, and sums the
// gradients of all its keys and values in memory of its own.
struct GradientPlan {
  Plan p;
  thal_gradients g;
  Program score_gradient;  // d score, then what is added to captured tensors
  int64_t items;
  int64_t key_width, value_width;  // elements of a row of sums: whole vectors
  int64_t own_bytes;               // sums of the largest item that has its keys to itself, in scratch
  int64_t partial_bytes;           // of the largest that shares them with others: these are added up at the end
  int64_t partial_count;
  char* partials;
  // Sums over pairs, of a mask or captured tensors. Items of a group run one after the other and add to one copy.
  int64_t groups, copies;
  bool by_head;  // the groups are the key heads, which share one copy and write to places of their own
  double* copy_sums;

  // Byte offsets inside one thread's scratch, beside those of the plan.
  int64_t at_weights, at_gradients, at_narrow_weights, at_narrow_gradients, at_key_pairs, at_query_rows, at_above, at_above_rows, at_delta, at_shift, at_out, at_clean, at_kept;
  int64_t at_program, at_keys;
  int64_t scratch_bytes;

  bool sums() const { return g.contribution_count || g.mask_sum >= 0; }
};

struct GradientItem {
  Sequence sequence;
  int64_t kv_head, tile0, tiles;
  char* partial;  // where keys and values are summed; null: in scratch
  double* sums;
};

int64_t make_gradient_plan(const thal_attention& call, const thal_gradients& gradients, GradientPlan& plan);
int run_gradient_plan(GradientPlan& plan, void* workspace);
// Floats of a row of `columns` in whole vectors.
inline int64_t chunked_columns(int64_t columns, int64_t lanes) { return (columns + lanes - 1) / lanes * lanes; }
// The rows [tile0, tile0 + tiles) of an item, tile by tile, as the kernels of attention know them.
Item tile_item(const GradientPlan& plan, const GradientItem& item, int64_t tile);

}  // namespace thal
