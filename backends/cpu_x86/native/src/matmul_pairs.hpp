// Panels of bf16 pairs: where VDPBF16PS is the faster way to multiply, operands that are bf16 stay so. A word is two
// neighbouring elements along K; a missing last one is zero.
#pragma once

#include "matmul_pack.hpp"

namespace {

// Words [w, w + N) of a contiguous line of `depth` bf16.
template <class V>
typename V::F line_words(const char* line, int64_t w, int64_t depth) {
  const int64_t whole = depth / 2 - w;
  if (whole >= V::N) return V::load(reinterpret_cast<const float*>(line + w * 4));
  if (depth % 2 == 0) return V::load_words(line + w * 4, static_cast<int>(smaller(V::N, whole)));
  alignas(64) uint16_t words[2 * V::N] = {};
  std::memcpy(words, line + w * 4, static_cast<size_t>(depth - 2 * w) * 2);
  return V::load(reinterpret_cast<const float*>(words));
}

// Rows 2i and 2i + 1 interleaved, for contiguous columns.
template <class V>
void zip_rows_pairs(const Elements& from, int64_t depth, int64_t columns, int64_t width, float* to) {
  for (int64_t j = 0; j < width; j += V::N) {
    const int some = static_cast<int>(larger(0, smaller(V::N, columns - j)));
    const auto row = [&](int64_t k) { return from.data + (k * from.row_stride + j) * 2; };
    int64_t k = 0;
    if (some == V::N && width - j >= V::N)  // no masks where none are needed
      for (; k + 1 < depth; k += 2) V::store(to + k / 2 * width + j, V::zip_rows(row(k), row(k + 1), V::N));
    for (; k < depth; k += 2)
      V::template store_part<THAL_F32>(to + k / 2 * width + j, V::zip_rows(row(k), k + 1 < depth ? row(k + 1) : nullptr, some),
                                       static_cast<int>(smaller(V::N, width - j)));
  }
}

// Element (k, j), k < depth and j < columns, to half k % 2 of to[k / 2 * width + j]; zero for columns <= j < width.
template <class V>
void zip_pairs(const Elements& from, int64_t depth, int64_t columns, int64_t width, float* to, char* buffer) {
  if (from.column_stride == 1) return zip_rows_pairs<V>(from, depth, columns, width, to);
  const int64_t words = (depth + 1) / 2;
  for (int64_t j = 0; j < width; j += V::N) {
    const char* lines[V::N];
    for (int64_t i = 0; i < V::N; ++i) {
      const char* line = from.data + (j + i) * from.column_stride * 2;
      lines[i] = j + i < columns ? contiguous_row<2>(line, from.row_stride, depth, buffer + i * kLineBytes) : nullptr;
    }
    for (int64_t w = 0; w < words; w += V::N) {
      if (from.row_stride == 1) prefetch_lines<V>(lines, w * 4, V::N * from.column_stride * 2);
      typename V::F square[V::N];
      for (int i = 0; i < V::N; ++i) square[i] = lines[i] ? line_words<V>(lines[i], w, depth) : V::zero();
      store_square<V>(square, smaller(V::N, words - w), words - w, width, j, to + w * width + j);
    }
  }
}

template <class V>
void pack_left_pairs(const MatmulPlan& p, const MatmulBlock& b, void* panels, char* scratch) {
  const thal_matmul& c = p.call;
  const int64_t first = thal::batch_offset(c, c.a_batch_stride, b.batch) + b.k0 * c.a_stride[1];
  const char* data = static_cast<const char*>(c.a) + first * 2;
  float* to = static_cast<float*>(panels);
  const int64_t last = b.first + b.count;
  for (int64_t m = b.first; m < last; m += V::kRows, to += p.words(b.depth) * V::kRows) {
    const Elements from{data + m * c.a_stride[0] * 2, c.a_stride[1], c.a_stride[0]};
    zip_pairs<V>(from, b.depth, smaller(V::kRows, last - m), V::kRows, to, scratch + p.at_buffer);
  }
}

template <class V>
void pack_right_pairs(const MatmulPlan& p, const MatmulBlock& b, void* panels, char* scratch) {
  const thal_matmul& c = p.call;
  const int64_t first = thal::batch_offset(c, c.b_batch_stride, b.batch) + b.k0 * c.b_stride[0];
  const char* data = static_cast<const char*>(c.b) + first * 2;
  float* to = static_cast<float*>(panels);
  const int64_t last = b.first + b.count;
  for (int64_t n = b.first, width; n < last; n += width, to += p.words(b.depth) * width) {
    width = panel_width<V>(last - n);
    const Elements from{data + n * c.b_stride[1] * 2, c.b_stride[0], c.b_stride[1]};
    zip_pairs<V>(from, b.depth, smaller(width, last - n), width, to, scratch + p.at_buffer);
  }
}

}  // namespace
