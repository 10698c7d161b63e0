// The product that gives the gradients of keys and values: c[key][column] += sum over query rows of
// weights[key][row] * rows[row][column]. Columns are the vector lanes here; weights are broadcast from where the score
// tile left them, a row for each key and 32 or so query rows side by side.
#pragma once

#include "gemm.hpp"

namespace {

// Weights of a tile, panel by panel: panel p has a row of W weights for each key, float32 or bf16; keys from limits[p] on
// have weight 0.
struct TileWeights {
  const char* data;
  int64_t panels, panel_bytes, rows;  // rows: of all panels together; only the last may be partly filled
  const int64_t* limits;
};

// NR keys from key j on, NC vectors of columns. `rows` is packed: NC vectors for each query row, or pair of them.
template <class V, bool PAIRS, int W, int NR, int NC>
THAL_NOINLINE void add_outer(const TileWeights& w, int64_t j, const Real<V>* rows, Real<V>* c, int64_t stride) {
  constexpr int64_t words = PAIRS ? W / 2 : W, kWord = sizeof(Real<V>);
  typename V::F acc[NR * NC];
  each<NR * NC>([&](auto i) { acc[i] = V::zero(); });
  for (int64_t p = 0; p < w.panels; ++p) {
    if (w.limits[p] <= j) continue;
    const int64_t left = w.rows - p * W, depth = smaller(words, PAIRS ? (left + 1) / 2 : left);
    const AlongRow<Real<V>> weights(w.data + p * w.panel_bytes + j * words * kWord, words * kWord);
    multiply_into<V, PAIRS, NR, NC>(acc, weights, rows + p * words * NC * V::N, depth);
  }
  each<NR * NC>([&](auto i) {
    Real<V>* out = c + i / NC * stride + i % NC * V::N;
    V::store(out, V::add(V::load(out), acc[i]));
  });
}

// Packed rows of `columns` columns lie in chunks of two vectors of columns, the last of one where that is enough.
template <class V>
int64_t chunk_columns(int64_t column, int64_t columns) {
  return columns - column > V::N ? 2 * V::N : V::N;
}

// All of a block: `keys` keys, c of rows `stride` floats apart with room for whole vectors and whole groups of keys.
// A chunk of packed rows holds `depth` of them.
template <class V, bool PAIRS, int W>
void add_outer_block(const TileWeights& w, int64_t keys, const Real<V>* rows, int64_t depth, int64_t columns, Real<V>* c,
                     int64_t stride) {
  for (int64_t j = 0; j < keys; j += V::kRows) {
    const Real<V>* chunk = rows;
    for (int64_t e = 0, width; e < columns; e += width) {
      width = chunk_columns<V>(e, columns);
      if (width == V::N) {
        add_outer<V, PAIRS, W, V::kRows, 1>(w, j, chunk, c + j * stride + e, stride);
      } else {
        add_outer<V, PAIRS, W, V::kRows, 2>(w, j, chunk, c + j * stride + e, stride);
      }
      chunk += depth * width;
    }
  }
}

}  // namespace
