// Products of a few rows, which read each element of b for the first time and the last: b is not packed, and every element
// goes from memory to the multiply-adds. Memory's bandwidth is what bounds them.
#pragma once

#include "matmul_pack.hpp"

namespace {

using thal::MatmulTile;

// b's rows are contiguous: a few of them at a time are added to sums that stay in the L1 cache.
template <class V, int DT, int M>
void sum_down(const Elements& b, const Real<V>* a, int64_t pitch, int64_t depth, int64_t columns, Real<V>* tile,
              int64_t stride) {
  constexpr int kStep = 8;
  constexpr int64_t size = size_of<DT>();
  for (int64_t k = 0; k < depth; k += kStep) {
    const int64_t steps = smaller(kStep, depth - k);
    const char* rows = b.data + k * b.row_stride * size;
    const auto add = [&](int64_t j, auto load) {
      typename V::F acc[M];
      each<M>([&](auto m) { acc[m] = k ? V::load(tile + m * stride + j) : V::zero(); });
      const auto step = [&](int64_t i) {
        const typename V::F x = load(rows + (i * b.row_stride + j) * size);
        each<M>([&](auto m) { acc[m] = V::fma(x, V::set1(a[m * pitch + k + i]), acc[m]); });
      };
      if (steps == kStep) each<kStep>([&](auto i) { step(i); });
      else
        for (int64_t i = 0; i < steps; ++i) step(i);
      each<M>([&](auto m) { V::store(tile + m * stride + j, acc[m]); });
    };
    int64_t j = 0;
    for (; j + V::N <= columns; j += V::N) add(j, [](const char* x) { return V::template load_as<DT>(x); });
    const int rest = static_cast<int>(columns - j);
    if (rest) add(j, [rest](const char* x) { return V::template load_part<DT>(x, rest); });
  }
}

// b's columns are contiguous: four of them at a time are multiplied by the rows of a.
template <class V, int DT, int M>
void sum_along(const Elements& b, const Real<V>* a, int64_t pitch, int64_t depth, int64_t columns, Real<V>* tile,
               int64_t stride) {
  constexpr int kColumns = 4;
  constexpr int64_t size = size_of<DT>();
  for (int64_t n = 0; n < columns; n += kColumns) {
    const char* lines[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) lines[i] = b.data + smaller(n + i, columns - 1) * b.column_stride * size;
    typename V::F acc[kColumns * M];
    each<kColumns * M>([&](auto i) { acc[i] = V::zero(); });
    const auto add = [&](int64_t k, auto load, auto load_a) {
      typename V::F x[M];
      each<M>([&](auto m) { x[m] = load_a(a + m * pitch + k); });
      each<kColumns>([&](auto i) {
        const typename V::F y = load(lines[i] + k * size);
        each<M>([&](auto m) { acc[i * M + m] = V::fma(y, x[m], acc[i * M + m]); });
      });
    };
    int64_t k = 0;
    for (; k + V::N <= depth; k += V::N)
      add(k, [](const char* p) { return V::template load_as<DT>(p); }, [](const Real<V>* p) { return V::load(p); });
    const int rest = static_cast<int>(depth - k);
    if (rest)
      add(k, [rest](const char* p) { return V::template load_part<DT>(p, rest); },
          [rest](const Real<V>* p) { return V::template load_part<real_type<V>()>(p, rest); });
    for (int64_t i = 0; i < smaller(kColumns, columns - n); ++i)
      for (int64_t m = 0; m < M; ++m) tile[m * stride + n + i] = V::reduce_add(acc[i * M + m]);
  }
}

template <class V, int DT, int M>
void sum_rows_of(const MatmulPlan& p, const MatmulTile& t, const Real<V>* a, int64_t pitch, Real<V>* tile) {
  const thal_matmul& c = p.call;
  const int64_t first = thal::batch_offset(c, c.b_batch_stride, t.batch) + t.n0 * c.b_stride[1];
  const Elements b{static_cast<const char*>(c.b) + first * size_of<DT>(), c.b_stride[0], c.b_stride[1]};
  if (b.column_stride == 1) sum_down<V, DT, M>(b, a, pitch, c.K, t.columns, tile, p.tile_stride());
  else sum_along<V, DT, M>(b, a, pitch, c.K, t.columns, tile, p.tile_stride());
}

template <class V, int DT>
void sum_rows(const MatmulPlan& p, const MatmulTile& t, const Real<V>* a, int64_t pitch, Real<V>* tile) {
  static_assert(thal::kFewRows == 4, "a case for each number of rows");
  switch (t.rows) {
    case 1:
      return sum_rows_of<V, DT, 1>(p, t, a, pitch, tile);
    case 2:
      return sum_rows_of<V, DT, 2>(p, t, a, pitch, tile);
    case 3:
      return sum_rows_of<V, DT, 3>(p, t, a, pitch, tile);
    default:
      return sum_rows_of<V, DT, 4>(p, t, a, pitch, tile);
  }
}

// All rows of a, widened and with their prologue, are in scratch for as long as the tile is summed.
template <class V>
void sum_few_rows(const MatmulPlan& p, const MatmulTile& t, Real<V>* tile, char* scratch) {
  const thal_matmul& c = p.call;
  const int64_t pitch = padded(c.K), size = type_bytes(c.a_type);
  Real<V>* a = reinterpret_cast<Real<V>*>(scratch + p.at_left);
  const char* data = static_cast<const char*>(c.a) + thal::batch_offset(c, c.a_batch_stride, t.batch) * size;
  widen_any<V>(c.a_type, {data, c.a_stride[0], c.a_stride[1]}, t.rows, c.K, pitch, a, scratch + p.at_buffer);
  if (c.a_prologue) {
    const Strips strips{p.a_prologue, *c.a_prologue, t.batch, 0, 0, scratch + p.at_program, scratch + p.at_indices};
    strips.replace(a, pitch, t.rows, pitch);
  }
  switch (c.b_type) {
    case THAL_F32:
      return sum_rows<V, THAL_F32>(p, t, a, pitch, tile);
    case THAL_BF16:
      return sum_rows<V, THAL_BF16>(p, t, a, pitch, tile);
    case THAL_F16:
      return sum_rows<V, THAL_F16>(p, t, a, pitch, tile);
    default:
      if constexpr (sizeof(Real<V>) == 8) sum_rows<V, THAL_F64>(p, t, a, pitch, tile);
  }
}

}  // namespace
