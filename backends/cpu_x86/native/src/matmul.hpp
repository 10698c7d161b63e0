// A fused matrix product, checked and laid out: blocks, what is packed once for all, and the layout of scratch memory.
//
//   out_i = epilogue_i(a_prologue(a) @ b_prologue(b) + bias)
//
// The result is cut into tiles of rows x columns. A tile is summed in scratch memory, block by block of K, by products of
// packed panels: `left` holds kRows rows of a side by side for each k, `right` two vectors of columns of b. An operand that
// several tiles read is packed once, beforehand, into memory that all threads share ("shared"), with its prologue
// applied; one that is read once is packed by the tile itself. Then bias and epilogue go over the tile while it is in the
// cache, and results are rounded once.
#pragma once

#include "panel_source.hpp"
#include "plan.hpp"

namespace thal {

// Most rows of b in a block: 256 rows of a panel of 32 float32 columns are 32 KB.
constexpr int64_t kDepthMost = 256;

struct MatmulPlan {
  thal_matmul call;
  const Isa* isa;
  const MatmulKernels* kernels;
  int64_t real;                   // bytes of the float32 or float64 that is computed with
  int64_t depth, rows, columns;   // of a block of K, and of a tile: multiples of the kernels' panels
  int64_t row_tiles, column_tiles;
  bool share_left, share_right;
  int64_t group_rows, group_columns;  // what of the result is computed from what is shared at a time
  Program a_prologue, b_prologue, epilogue;
  PanelSource source;
  const void* bias;  // N numbers as they are computed with, or null

  // Byte offsets inside one thread's scratch.
  int64_t at_tile, at_left, at_right, at_block, at_indices, at_program, at_buffer, scratch_bytes;

  int64_t tile_stride() const { return columns + 64 / real; }  // so that rows do not all fall into the same cache sets
  int64_t offset(const int64_t* batch_stride, int64_t batch) const;  // elements to an entry of the flattened batch
};

// One tile; `left` and `right` are its packed operands where they are shared.
struct MatmulTile {
  int64_t batch, m0, rows, n0, columns;
  const void *left, *right;
};

// A block to be packed: rows [m0, m0 + count) of a, or columns [n0, n0 + count) of b, and depth of K.
struct MatmulBlock {
  int64_t batch, first, count, k0, depth;
};

}  // namespace thal
