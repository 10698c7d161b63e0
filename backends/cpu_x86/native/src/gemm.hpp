// The register-tiled product both halves of the tile kernel use.
//
//   c[r][lane] = sum over k of a[r][k] * panel[k][lane]
//
// Query rows are the vector lanes. A panel (the packed query for QK^T, the weights for PV) holds NQ vectors per k; the
// other operand (keys, or values) is broadcast one 32-bit word at a time straight from where it lies. So neither keys
// nor values are ever transposed, the softmax needs no horizontal operation, and for bf16 a 32-bit word is a pair that
// VDPBF16PS consumes. Per k: NR broadcasts and NQ loads feed NR * NQ multiply-adds.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "torchhal_cpu_x86.h"

namespace {

#if defined(_MSC_VER) && !defined(__clang__)
#define THAL_INLINE __forceinline
#define THAL_NOINLINE __declspec(noinline)
#else
#define THAL_INLINE inline __attribute__((always_inline))
#define THAL_NOINLINE __attribute__((noinline))
#endif

// What V computes with, and its code.
template <class V>
using Real = typename V::T;
template <class V>
constexpr int real_type() {
  return sizeof(Real<V>) == 8 ? THAL_F64 : THAL_F32;
}

// f(0), ..., f(N - 1) with constant arguments. Loops over accumulators are written with it because an array indexed by
// a variable, even one of a loop the compiler later unrolls, lives on the stack: that cost 24 stores per call here.
template <class F, int... I>
THAL_INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
THAL_INLINE void each(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

// Keys: rows `stride` bytes apart, consecutive words along k. A word is an element, or a pair of bf16.
template <class T>
struct AlongRow {
  const char *base0, *base3, *base6, *base9;
  int64_t stride;
  AlongRow(const char* a, int64_t s) : base0(a), base3(a + 3 * s), base6(a + 6 * s), base9(a + 9 * s), stride(s) {}
  // Four pointers and one stride reach twelve rows; a pointer each would spill general registers.
  template <int R>
  THAL_INLINE const char* word() const {
    return (R < 3 ? base0 : R < 6 ? base3 : R < 9 ? base6 : base9) + (R % 3) * stride;
  }
  THAL_INLINE void next() { base0 += sizeof(T), base3 += sizeof(T), base6 += sizeof(T), base9 += sizeof(T); }
};

// Values: consecutive words along r, `stride` bytes from one k to the next.
template <class T>
struct AcrossRows {
  const char* base;
  int64_t stride;
  AcrossRows(const char* a, int64_t s) : base(a), stride(s) {}
  template <int R>
  THAL_INLINE const char* word() const {
    return base + sizeof(T) * R;
  }
  THAL_INLINE void next() { base += stride; }
};

template <class V, bool PAIRS>
THAL_INLINE typename V::F multiply_add(typename V::F x, typename V::F panel, typename V::F acc) {
  if constexpr (PAIRS) {
    return V::dot_pairs(acc, x, panel);
  } else {
    return V::fma(x, panel, acc);
  }
}

// acc[r * NQ + q] += sum over k < depth.
template <class V, bool PAIRS, int NR, int NQ, class A>
THAL_INLINE void multiply_into(typename V::F (&acc)[NR * NQ], A a, const Real<V>* panel, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, panel += NQ * V::N) {
    typename V::F b[NQ];
    each<NQ>([&](auto q) { b[q] = V::load(panel + q * V::N); });
    typename V::F x = b[0];
    each<NR * NQ>([&](auto i) {
      constexpr int r = decltype(i)::value / NQ, q = decltype(i)::value % NQ;
      if constexpr (q == 0) x = V::broadcast(a.template word<r>());
      acc[r * NQ + q] = multiply_add<V, PAIRS>(x, b[q], acc[r * NQ + q]);
    });
    a.next();
  }
}

template <class V, bool PAIRS, int NR, int NQ, class A>
THAL_INLINE void multiply(typename V::F (&acc)[NR * NQ], A a, const Real<V>* panel, int64_t depth) {
  each<NR * NQ>([&](auto i) { acc[i] = V::zero(); });
  multiply_into<V, PAIRS, NR, NQ>(acc, a, panel, depth);
}

// Scores of NR keys: c[r] = a[r] . panel, and the running maximum of each lane.
template <class V, bool PAIRS, int NR, int NQ>
THAL_NOINLINE void score_rows(const char* keys, int64_t stride, const Real<V>* panel, int64_t depth, Real<V>* c, Real<V>* top) {
  typename V::F acc[NR * NQ];
  multiply<V, PAIRS, NR, NQ>(acc, AlongRow<Real<V>>(keys, stride), panel, depth);
  each<NR * NQ>([&](auto i) { V::store(c + i * V::N, acc[i]); });
  each<NQ>([&](auto q) {
    typename V::F most = V::load(top + q * V::N);
    each<NR>([&](auto r) { most = V::max(most, acc[decltype(r)::value * NQ + decltype(q)::value]); });
    V::store(top + q * V::N, most);
  });
}

// NR columns of the output: c[r] = c[r] * alpha + a[r] . panel. Each block sums from zero, so rounding errors grow with
// the block and the number of blocks, not with the number of keys.
template <class V, bool PAIRS, int NR, int NQ>
THAL_NOINLINE void value_columns(const char* values, int64_t stride, const Real<V>* panel, int64_t depth, Real<V>* c,
                                 const Real<V>* alpha) {
  typename V::F acc[NR * NQ];
  multiply<V, PAIRS, NR, NQ>(acc, AcrossRows<Real<V>>(values, stride), panel, depth);
  each<NR * NQ>([&](auto i) {
    Real<V>* out = c + i * V::N;
    V::store(out, V::fma(V::load(out), V::load(alpha + i % NQ * V::N), acc[i]));
  });
}

// The same two products where V has a tile unit; gemm_tiles.hpp.
template <class V, int NQ>
void tile_scores(const char* keys, int64_t stride, int64_t count, const float* panel, int64_t depth, float* c, float* top);
template <class V, int NQ>
void tile_weighted_values(const char* values, int64_t columns, const float* panel, int64_t depth, float* c,
                          const float* alpha);

// Products in progress on a unit that works beside the vector units: none here, gemm_tiles.hpp has the other.
template <class V, int NQ, bool TILES = V::kTiles>
struct Background {
  void step() {}
};

template <class V, bool PAIRS, int NQ>
void scores(const char* keys, int64_t stride, int64_t count, const Real<V>* panel, int64_t depth, Real<V>* c, Real<V>* top) {
  if constexpr (PAIRS && V::kTiles) return tile_scores<V, NQ>(keys, stride, count, panel, depth, c, top);
  constexpr int M = V::kRows;
  constexpr int W = NQ * V::N;
  for (int q = 0; q < NQ; ++q) V::store(top + q * V::N, V::set1(-kInf));
  int64_t j = 0;
  for (; j + M <= count; j += M) score_rows<V, PAIRS, M, NQ>(keys + j * stride, stride, panel, depth, c + j * W, top);
  for (; j + 4 <= count; j += 4) score_rows<V, PAIRS, 4, NQ>(keys + j * stride, stride, panel, depth, c + j * W, top);
  for (; j < count; ++j) score_rows<V, PAIRS, 1, NQ>(keys + j * stride, stride, panel, depth, c + j * W, top);
}

template <class V, bool PAIRS, int NQ>
void weighted_values(const char* values, int64_t stride, int64_t columns, const Real<V>* panel, int64_t depth, Real<V>* c,
                     const Real<V>* alpha) {
  if constexpr (PAIRS && V::kTiles) return tile_weighted_values<V, NQ>(values, columns, panel, depth, c, alpha);
  constexpr int M = V::kRows;
  constexpr int H = M * 2 / 3;  // 64 columns are four twelves and two eights: no thin remainder
  constexpr int W = NQ * V::N;
  int64_t e = 0;
  for (; e + M <= columns && columns - e != 2 * H; e += M)
    value_columns<V, PAIRS, M, NQ>(values + sizeof(Real<V>) * e, stride, panel, depth, c + e * W, alpha);
  for (; e + H <= columns; e += H)
    value_columns<V, PAIRS, H, NQ>(values + sizeof(Real<V>) * e, stride, panel, depth, c + e * W, alpha);
  for (; e < columns; ++e) value_columns<V, PAIRS, 1, NQ>(values + sizeof(Real<V>) * e, stride, panel, depth, c + e * W, alpha);
}

}  // namespace
