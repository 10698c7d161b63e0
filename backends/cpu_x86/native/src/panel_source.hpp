// Where the packed product (matmul_tile.hpp) takes its right operand from: a plain strided matrix, or anything else that
// can write a block of it as numbers, such as a quantised weight.
#pragma once

#include <cstdint>

namespace thal {

// Rows [k0, k0 + depth) and columns [n0, n0 + columns) of an operand (K, N), of one entry of the flattened batch.
struct PanelBlock {
  int64_t batch;
  int64_t k0, depth;    // k0 is a multiple of 32, and depth at most kDepthMost of matmul.hpp
  int64_t n0, columns;  // columns is at most the panel's width
};

struct PanelSource {
  // Writes element (k0 + k, n0 + n) to panel[k * width + n], and 0 where columns <= n < width.
  //
  // `width` is one or two vectors, or 16 or 32 numbers where a captured function follows. `panel` holds depth * width
  // numbers and is aligned to 64 bytes: float32, or float64 in a product of that type. The blocks of one call are asked for
  // once each for each time that they are packed, in any order, by several threads at once: a source keeps no state.
  // `buffer`, the caller's own, has `buffer_bytes` bytes, aligned to 64.
  void (*fill)(const void* context, const PanelBlock& block, int64_t width, void* panel, char* buffer);
  const void* context;
  int64_t buffer_bytes;
};

}  // namespace thal
