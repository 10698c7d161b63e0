// The products of gemm.hpp on a unit that multiplies tiles of bf16 pairs.
//
// A tile of sums holds 16 rows (keys, or columns of the output) of 16 query lanes. Its first factor is 16 rows of 32
// consecutive bf16: keys lie so in memory, values are transposed once for all panels (transpose_values in pack.hpp). Its
// second factor is 16 rows of 16 lanes of pairs: a packed query and the weights are that already. Two by two tiles of sums
// share their factors, so four loads feed four products. Tiles are always full: whoever packs pads keys and queries along
// the head dimension with zeros, and rows past the last are computed and not looked at.
//
// A product is done in steps, because the tile unit and the vector units can work at the same time: the softmax of one panel
// takes a step of other panels' products every few vectors.
#pragma once

#include <cstring>

#include "gemm.hpp"

namespace {

// Sums m * 2 + q, of rows 16 m and lanes 16 q, gain what one tile of depth gives.
template <class T, int NR, int NQ>
THAL_INLINE void add_products(const char* a, int64_t stride, const float* pairs) {
  each<NR>([&](auto m) { T::template load<4 + m>(a + 16 * m * stride, stride); });
  each<NQ>([&](auto q) { T::template load<6 + q>(pairs + 16 * q, NQ * 64); });
  each<NR * NQ>([&](auto i) {
    constexpr int m = decltype(i)::value / NQ, q = decltype(i)::value % NQ;
    T::template multiply<m * 2 + q, 4 + m, 6 + q>();
  });
}

// One product. Sink says where sums go: place(r) is memory for the sums of 32 rows from r on, and done(r, n) is told that
// those of n rows are there, one pair of tiles later, so that the unit has something to do meanwhile.
template <class V, int NQ, class Sink>
class TileProduct {
  using T = typename V::Tiles;
  static constexpr int W = NQ * V::N;

  const char* a_;
  const float* pairs_;
  int64_t stride_, depth_, whole_;  // words of depth, and those of whole tiles
  int64_t rows_ = 0, row_ = 0, word_ = 0;
  alignas(64) float last_[16 * W];  // the rows of pairs past the last whole tile, padded with zeros

 public:
  Sink sink;

  // sums[r] = a[r] . pairs for r < rows, a's rows `stride` bytes apart.
  void begin(const char* a, int64_t stride, int64_t rows, const float* pairs, int64_t depth) {
    a_ = a, stride_ = stride, rows_ = rows, pairs_ = pairs, depth_ = depth;
    row_ = word_ = 0, whole_ = depth / 16 * 16;
    if (whole_ == depth) return;
    const size_t rest = static_cast<size_t>(depth - whole_) * W;
    std::memcpy(last_, pairs + whole_ * W, rest * 4);
    std::memset(last_ + rest, 0, (16 * W - rest) * 4);
  }

  // Does a little of it; false when all is done.
  THAL_INLINE bool step() {
    if (row_ >= rows_) return false;
    if (rows_ - row_ > 16) {
      step_rows<2>();
    } else {
      step_rows<1>();
    }
    return true;
  }

 private:
  template <int NR>
  void step_rows() {
    if (word_ == 0) each<NR * NQ>([](auto i) { T::template zero<i / NQ * 2 + i % NQ>(); });
    add_products<T, NR, NQ>(a_ + row_ * stride_ + 4 * word_, stride_, word_ < whole_ ? pairs_ + word_ * W : last_);
    word_ += 16;
    if (word_ < depth_) return;
    float* sums = sink.place(row_);
    each<NR * NQ>([&](auto i) {
      constexpr int m = decltype(i)::value / NQ, q = decltype(i)::value % NQ;
      T::template store<m * 2 + q>(sums + 16 * m * W + 16 * q, W * 4);
    });
    if (row_ > 0) sink.done(row_ - 32, 32);
    if (row_ + 32 >= rows_) sink.done(row_, rows_ - row_);
    row_ += 32, word_ = 0;
  }
};

// Scores go to their block, and their largest are kept.
template <class V, int NQ>
struct ScoreSink {
  static constexpr int W = NQ * V::N;
  float* scores;
  alignas(64) float top[W];

  void begin(float* block) {
    scores = block;
    for (int q = 0; q < NQ; ++q) V::store(top + q * V::N, V::set1(-kInf));
  }
  float* place(int64_t j) { return scores + j * W; }
  void done(int64_t j, int64_t n) {
    typename V::F most[NQ];
    each<NQ>([&](auto q) { most[q] = V::load(top + q * V::N); });
    for (const float* row = scores + j * W; row < scores + (j + n) * W; row += W)
      each<NQ>([&](auto q) { most[q] = V::max(most[q], V::load(row + q * V::N)); });
    each<NQ>([&](auto q) { V::store(top + q * V::N, most[q]); });
  }
};

// Columns of the output, c[r] = c[r] * alpha + sums[r]: blocks sum from zero, see value_columns.
template <class V, int NQ>
struct ValueSink {
  static constexpr int W = NQ * V::N;
  float* out;
  const float* alpha;
  alignas(64) float sums[2][32 * W];

  float* place(int64_t e) { return sums[e / 32 % 2]; }
  void done(int64_t e, int64_t n) {
    typename V::F fade[NQ];
    each<NQ>([&](auto q) { fade[q] = V::load(alpha + q * V::N); });
    const float* sum = place(e);
    for (float* c = out + e * W; c < out + (e + n) * W; c += W, sum += W)
      each<NQ>([&](auto q) {
        V::store(c + q * V::N, V::fma(V::load(c + q * V::N), fade[q], V::load(sum + q * V::N)));
      });
  }
};

// What the tile unit has to do while the vector units do something else: at most one product of values, and after it, not
// before, one of keys.
template <class V, int NQ>
struct Background<V, NQ, true> {
  // As scores() in gemm.hpp. Reads keys, and writes sums, of as many rows as make tiles.
  void begin_scores(const char* keys, int64_t stride, int64_t count, const float* panel, int64_t depth, float* c) {
    scores_.sink.begin(c);
    scores_.begin(keys, stride, count, panel, depth);
  }
  // As weighted_values() in gemm.hpp, for values as transpose_values leaves them. `alpha` is read until all is done.
  void begin_values(const char* values, int64_t columns, const float* panel, int64_t depth, float* c, const float* alpha) {
    values_.sink.out = c, values_.sink.alpha = alpha;
    values_.begin(values, V::kTileKeys * 2, columns, panel, depth);
  }
  THAL_INLINE bool step() { return values_.step() || scores_.step(); }
  // The rest of both, and the largest scores.
  void finish(float* top) {
    while (step()) {
    }
    std::memcpy(top, scores_.sink.top, sizeof(scores_.sink.top));
  }

 private:
  TileProduct<V, NQ, ValueSink<V, NQ>> values_;
  TileProduct<V, NQ, ScoreSink<V, NQ>> scores_;
};

// The two products with nothing beside them.
template <class V, int NQ>
void tile_scores(const char* keys, int64_t stride, int64_t count, const float* panel, int64_t depth, float* c, float* top) {
  TileProduct<V, NQ, ScoreSink<V, NQ>> product;
  product.sink.begin(c);
  product.begin(keys, stride, count, panel, depth);
  while (product.step()) {
  }
  std::memcpy(top, product.sink.top, sizeof(product.sink.top));
}

template <class V, int NQ>
void tile_weighted_values(const char* values, int64_t columns, const float* panel, int64_t depth, float* c,
                          const float* alpha) {
  TileProduct<V, NQ, ValueSink<V, NQ>> product;
  product.sink.out = c, product.sink.alpha = alpha;
  product.begin(values, V::kTileKeys * 2, columns, panel, depth);
  while (product.step()) {
  }
}

}  // namespace
