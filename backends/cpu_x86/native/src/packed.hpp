// Packed weights: their schemes, and which products with them are skinny: few rows of a, for which reading the weight once, at
// the speed of the memory, is all that counts.
#pragma once

#include "matmul.hpp"

namespace thal {

// Elements of a block of a GGUF file.
constexpr int64_t kBlockElements = 32;

inline bool is_blocks(int32_t scheme) { return scheme >= THAL_PACKED_Q4_0; }
constexpr int64_t block_bytes(int32_t scheme) {
  return scheme == THAL_PACKED_Q4_0 ? 18 : scheme == THAL_PACKED_Q4_1 ? 20 : 34;
}
// Bytes from a line of the data to the next: a row, of int4 two rows, or the blocks of a column.
inline int64_t line_bytes(const thal_packed& w) {
  return is_blocks(w.scheme) ? w.rows / kBlockElements * block_bytes(w.scheme) : w.columns;
}

int check_packed(const thal_matmul& call);  // THAL_OK where there is no packed weight

// Rows of a in a skinny product, and those that are multiplied at a time: reading the weight again for four more of them costs
// less than panels do: 16 rows by 4096 x 4096 of int8 took 4.7 ms and 7.7 ms.
constexpr int64_t kSkinnyRows = 16, kRowsTogether = 4;

// A skinny product is cut into parts: columns of a tile, and where those are too few a share of K. Partial sums are added in a
// fixed order; parts depend on sizes alone, never on the number of threads.
struct SkinnyPart {
  const float* rows;  // of a, prologue applied: M of them, `pitch` apart
  int64_t pitch;
  int64_t n0, columns, k0, depth;
  float* sums;  // M rows, MatmulPlan::tile_stride() apart
};

bool is_skinny(const MatmulPlan& plan);
void plan_skinny(MatmulPlan& plan);      // in place of the tiles of a large product
int run_skinny(const MatmulPlan& plan);  // may throw std::bad_alloc

}  // namespace thal
