// Writing finished rows: normalised into the output tensor, or as they are into a partial result of a split tile.
#pragma once

#include "pack.hpp"
#include "row_state.hpp"

namespace {

// The partial result of one item: rows x Ev unnormalised sums, then per row its maximum and its sum of weights.
template <class T>
T* partial_sums(const Item& it) {
  return reinterpret_cast<T*>(it.partial);
}

template <class T>
inline void emit_state(const Plan& p, const Item& it, int64_t i, T max, T sum) {
  if (it.partial) {
    T* maxima = partial_sums<T>(it) + p.tile_rows * p.call.Ev;
    maxima[i] = max;
    maxima[p.tile_rows + i] = sum;
  } else {
    store_row_state(p, it, i, max, sum);
  }
}

// w elements `stride` apart.
template <class V, int DT>
inline void store_columns(char* out, int64_t stride, typename V::F x, int w) {
  constexpr int64_t size = size_of<DT>();
  if (stride == 1) {
    V::template store_part<DT>(out, x, w);
    return;
  }
  alignas(64) char line[V::N * sizeof(Real<V>)];
  V::template store_part<DT>(line, x, w);
  for (int j = 0; j < w; ++j) std::memcpy(out + j * stride * size, line + j * size, static_cast<size_t>(size));
}

// Columns [e, e + w) of row i. `x` is already normalised unless the tile's keys are split.
template <class V, int DT>
inline void emit_columns(const Plan& p, const Item& it, int64_t i, int64_t e, typename V::F x, int w) {
  if (it.partial) {
    V::template store_part<real_type<V>()>(partial_sums<Real<V>>(it) + i * p.call.Ev + e, x, w);
    return;
  }
  constexpr int64_t size = size_of<DT>();
  const int64_t row = it.row0 + i, l = row / p.group, h = it.kv_head * p.group + row % p.group;
  const auto* s = p.call.out_stride;
  char* out = static_cast<char*>(p.call.out) + (it.sequence.out + h * s[1] + l * s[2] + e * s[3]) * size;
  store_columns<V, DT>(out, s[3], x, w);
}

}  // namespace
