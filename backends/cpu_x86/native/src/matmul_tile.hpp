// One tile of a fused matrix product: the sum over blocks of K, then bias, epilogue and the store.
#pragma once

#include "matmul_pairs.hpp"
#include "matmul_rows.hpp"
#include "packed_source.hpp"
#include "result_rows.hpp"

namespace {

// c (+)= NR rows of a left panel times NQ vectors of columns. The left panel is kRows wide, however many of them count.
template <class V, bool PAIRS, int NR, int NQ>
THAL_NOINLINE void micro_tile(const Real<V>* left, const Real<V>* right, int64_t depth, Real<V>* c, int64_t stride, bool add) {
  typename V::F acc[NR * NQ];
  const AcrossRows<Real<V>> rows(reinterpret_cast<const char*>(left), V::kRows * sizeof(Real<V>));
  multiply<V, PAIRS, NR, NQ>(acc, rows, right, depth);
  each<NR * NQ>([&](auto i) {
    Real<V>* at = c + i / NQ * stride + i % NQ * V::N;
    V::store(at, add ? V::add(V::load(at), acc[i]) : acc[i]);
  });
}

// The fewest of 12, 8, 5, 3, 2 and 1 rows (6, 4, 2 and 1) that are enough.
template <class V, bool PAIRS, int NQ, int NR = V::kRows>
void micro_rows(int64_t rows, const Real<V>* left, const Real<V>* right, int64_t depth, Real<V>* c, int64_t stride, bool add) {
  if constexpr (NR > 1)
    if (rows <= NR * 2 / 3) return micro_rows<V, PAIRS, NQ, NR * 2 / 3>(rows, left, right, depth, c, stride, add);
  micro_tile<V, PAIRS, NR, NQ>(left, right, depth, c, stride, add);
}

// A panel of b stays in the L1 cache while the panels of a pass by, which come from the L2 cache.
template <class V, bool PAIRS>
void multiply_block(const Real<V>* left, int64_t rows, const Real<V>* right, int64_t columns, int64_t depth, Real<V>* tile,
                    int64_t stride, bool add) {
  for (int64_t n = 0, width; n < columns; n += width, right += width * depth) {
    width = panel_width<V>(columns - n);
    const Real<V>* a = left;
    for (int64_t m = 0; m < rows; m += V::kRows, a += V::kRows * depth) {
      Real<V>* c = tile + m * stride + n;
      if (width == V::N) micro_rows<V, PAIRS, 1>(rows - m, a, right, depth, c, stride, add);
      else micro_rows<V, PAIRS, 2>(rows - m, a, right, depth, c, stride, add);
    }
  }
}

template <class V>
void add_bias(const MatmulPlan& p, const MatmulTile& t, Real<V>* tile) {
  const Real<V>* bias = reinterpret_cast<const Real<V>*>(p.bias.data()) + t.n0;
  const int64_t whole = t.columns / V::N * V::N;
  for (int64_t i = 0; i < t.rows; ++i, tile += p.tile_stride()) {
    for (int64_t j = 0; j < whole; j += V::N) V::store(tile + j, V::add(V::load(tile + j), V::load(bias + j)));
    for (int64_t j = whole; j < t.columns; ++j) tile[j] += bias[j];
  }
}

template <class V, int DT>
void round_rows(const MatmulTile& t, const Real<V>* tile, int64_t tile_stride, char* out, int64_t out_stride) {
  constexpr int64_t size = size_of<DT>();
  for (int64_t i = 0; i < t.rows; ++i, tile += tile_stride, out += out_stride * size)
    for (int64_t j = 0; j < t.columns; j += V::N)
      V::template store_part<DT>(out + j * size, V::load(tile + j), static_cast<int>(smaller(V::N, t.columns - j)));
}

template <class V>
void store_sums(const MatmulPlan& p, const MatmulTile& t, const Real<V>* tile) {
  const int64_t first = (t.batch * p.call.M + t.m0) * p.call.N + t.n0;
  const auto type = static_cast<Type>(p.call.out_types[0]);
  char* out = static_cast<char*>(p.call.out[0]) + first * thal::storage_of(type);
  if constexpr (sizeof(Real<V>) == 8) return round_rows<V, THAL_F64>(t, tile, p.tile_stride(), out, p.call.N);
  else if (type == Type::kF32) round_rows<V, THAL_F32>(t, tile, p.tile_stride(), out, p.call.N);
  else if (type == Type::kBF16) round_rows<V, THAL_BF16>(t, tile, p.tile_stride(), out, p.call.N);
  else round_rows<V, THAL_F16>(t, tile, p.tile_stride(), out, p.call.N);
}

template <class V>
void run_epilogue(const MatmulPlan& p, const MatmulTile& t, const Real<V>* tile, char* scratch) {
  const Strips strips{p.epilogue, *p.call.epilogue, t.batch, t.m0, t.n0, scratch + p.at_program, scratch + p.at_indices};
  strips.each(tile, p.tile_stride(), t.rows, padded(t.columns), [&](Frame& frame, int64_t i, int64_t j) {
    const int64_t first = (t.batch * p.call.M + t.m0 + i) * p.call.N + t.n0 + j;
    ResultRows rows{p.epilogue, p.call.out, first, p.call.N, smaller(kLanes, t.columns - j)};
    frame.sink = ResultRows::take, frame.sink_context = &rows;
    run_program(p.epilogue, frame);
  });
}

template <class V, bool PAIRS>
void sum_tile(const MatmulPlan& p, const MatmulTile& t, Real<V>* tile, char* scratch) {
  using T = Real<V>;
  if (p.call.K == 0) fill(tile, t.rows * p.tile_stride(), T(0));
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step * step; };
  const int64_t rows = up(t.rows, V::kRows), columns = up(t.columns, V::N);
  for (int64_t k = 0; k < p.call.K; k += p.depth) {
    const int64_t depth = smaller(p.depth, p.call.K - k);
    // What is shared lies block after block; anything else is packed here and now.
    const char* left = t.left ? t.left + p.words(k) * rows * p.real : scratch + p.at_left;
    const char* right = t.right ? t.right + p.words(k) * columns * p.real : scratch + p.at_right;
    if (!t.left) p.kernels->pack_left(p, {t.batch, t.m0, t.rows, k, depth}, scratch + p.at_left, scratch);
    if (!t.right) p.kernels->pack_right(p, {t.batch, t.n0, t.columns, k, depth}, scratch + p.at_right, scratch);
    const auto *a = reinterpret_cast<const T*>(left), *b = reinterpret_cast<const T*>(right);
    multiply_block<V, PAIRS>(a, t.rows, b, t.columns, p.words(depth), tile, p.tile_stride(), k > 0);
  }
}

// From sums to results.
template <class V>
void finish_tile(const MatmulPlan& p, const MatmulTile& t, Real<V>* tile, char* scratch) {
  if (!p.bias.empty()) add_bias<V>(p, t, tile);
  if (p.call.epilogue) run_epilogue<V>(p, t, tile, scratch);
  else store_sums<V>(p, t, tile);
}

template <class V, bool PAIRS>
void run_matmul_tile(const MatmulPlan& p, const MatmulTile& t, char* scratch) {
  Real<V>* tile = reinterpret_cast<Real<V>*>(scratch + p.at_tile);
  if (p.few_rows) sum_few_rows<V>(p, t, tile, scratch);
  else sum_tile<V, PAIRS>(p, t, tile, scratch);
  finish_tile<V>(p, t, tile, scratch);
}

template <class V>
constexpr thal::MatmulKernels matmul_kernels() {
  return {V::kRows, 2 * V::N, pack_left<V>, pack_right<V>, run_matmul_tile<V, false>, right_source<V>};
}

// Of products of bf16 pairs.
template <class V>
constexpr thal::MatmulKernels pair_kernels() {
  return {V::kRows, 2 * V::N, pack_left_pairs<V>, pack_right_pairs<V>, run_matmul_tile<V, true>, plain_source<V>};
}

}  // namespace
