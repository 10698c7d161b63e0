// A fused matrix product, checked and laid out: blocks, what is packed once for all, and the layout of scratch memory.
//
//   out_i = epilogue_i(a_prologue(a) @ b_prologue(b) + bias)
//
// The result is cut into tiles. A tile is summed in scratch memory, block by block of K, by products of packed panels:
// those of a hold `panel_rows` of its rows side by side for each k, those of b two vectors of columns. An operand that
// several tiles read is packed once, beforehand, into memory that all threads share, with its prologue applied; one that is
// read once is packed by the tile itself. Then bias and epilogue go over the tile while it is in the cache, and results are
// rounded once.
#pragma once

#include <vector>

#include "plan.hpp"

namespace thal {

// Most words along K in a block: of a panel of 32 float32 columns 32 KB.
constexpr int64_t kDepthMost = 256;
// So few rows are multiplied without packing b, where its rows or columns are contiguous and it has no prologue.
constexpr int64_t kFewRows = 4;
// What is packed for all threads takes at most so much of either operand. An operand of which not even one tile's share
// fits is packed by each tile again.
constexpr int64_t kSharedLeftBytes = int64_t{8} << 20, kSharedRightBytes = int64_t{16} << 20;

struct MatmulPlan {
  thal_matmul call;
  const Isa* isa;
  const MatmulKernels* kernels;
  int64_t real;                  // bytes of the float32 or float64 that is computed with
  int64_t step;                  // elements along K in a word of a panel: 1, or 2 of bf16 pairs
  bool few_rows;
  int64_t depth, rows, columns;  // of a block of K, and of a tile: multiples of the panels'
  int64_t row_tiles, column_tiles;
  bool share_left, share_right;
  int64_t group_rows, group_columns;  // tiles of a part of the result whose operands are in shared memory at once
  int64_t workers;
  Program a_prologue, b_prologue, epilogue;
  PanelSource source;
  int64_t splits = 1, split_depth;  // of a skinny product (packed.hpp): shares of K
  std::vector<char> bias;  // N numbers as they are computed with, or none

  // Byte offsets inside one thread's scratch.
  int64_t at_tile, at_left, at_right, at_block, at_indices, at_program, at_buffer, scratch_bytes;

  int64_t words(int64_t k) const { return (k + step - 1) / step; }
  // Elements from a row of the tile to the next: not a power of two, so that rows do not fall into the same cache sets.
  int64_t tile_stride() const { return columns + 64 / real; }
};

// Elements from the beginning of an operand to an entry of the flattened batch.
inline int64_t batch_offset(const thal_matmul& c, const int64_t* stride, int64_t batch) {
  int64_t offset = 0;
  for (int32_t d = c.batch_dims - 1; d >= 0; --d) {
    offset += batch % c.batch_sizes[d] * stride[d];
    batch /= c.batch_sizes[d];
  }
  return offset;
}

// A tile of the result; `left` and `right` are its operands, packed block after block of K, where they are shared.
struct MatmulTile {
  int64_t batch, m0, rows, n0, columns;
  const char *left, *right;
};

// A block to be packed: `count` rows of a, or columns of b, from `first` on, and `depth` of K.
struct MatmulBlock {
  int64_t batch, first, count, k0, depth;
};

}  // namespace thal
