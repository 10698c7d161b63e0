// The two products of attention for few rows: every key and value is read once, in the order it lies in memory, for all rows.
#pragma once

#include "keys.hpp"

namespace {

// What both work on. Rows of `q` are `width` floats apart, of `scores` kRowKeyBlock, of `o` `value_width`.
struct RowState {
  int64_t rows, E, Ev, width, value_width;  // the widths are padded to whole vectors
  float *q, *scores, *o;
};

// Keys of a block that lie at one stride, and their values likewise.
struct Run {
  const char *keys, *values;
  int64_t at, count;  // place in the block
  int64_t keys_ahead, values_ahead;  // bytes from here to what is to be fetched; 0 for nothing
};

struct Runs {
  const Run* first;
  int64_t count, stride;  // of values, in bytes
};

// Asks for what will be read a little later. The loops below do too much per line for the out-of-order window to reach
// far ahead: without this, decoding read 10 GB/s on one Zen 4 core, with it 16; nearer, or into L1, was slower, and so was
// multiplying bf16 in pairs, which leaves memory to wait for as long.
// Nothing where `ahead` is 0. Always inlined: GCC drops calls of a function that does no more than this.
THAL_INLINE void fetch_ahead(const char* row, int64_t ahead, int64_t at) {
  if (ahead && at % 64 == 0) _mm_prefetch(row + ahead + at, _MM_HINT_T1);
}

// Calls use(r, R) for all rows, four, two and one at a time.
template <class Use>
void for_rows(int64_t rows, Use use) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) use(r, std::integral_constant<int, 4>{});
  for (; r + 2 <= rows; r += 2) use(r, std::integral_constant<int, 2>{});
  for (; r < rows; ++r) use(r, std::integral_constant<int, 1>{});
}

// Sums of R rows and K keys as scores.
template <class V, int R, int K>
THAL_INLINE void store_scores(const typename V::F (&acc)[R][K], float* scores) {
  each<R>([&](auto r) {
    float* s = scores + r * thal::kRowKeyBlock;
    if constexpr (K == 4) {
      _mm_storeu_ps(s, V::reduce4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
    } else {
      s[0] = V::reduce_add(acc[r][0]);
    }
  });
}

// In float32, from keys and values of type T.
template <class V, int T>
class RowProducts {
  using F = typename V::F;
  static constexpr int N = V::N;
  static constexpr int64_t kBlock = thal::kRowKeyBlock, kSize = size_of<T>();

  const RowState s_;

 public:
  explicit RowProducts(const RowState& state) : s_(state) {}

  // Scores of the keys of a run whose rows are `stride` bytes apart.
  void score(const Run& run, int64_t stride) const {
    for_rows(s_.rows, [&](int64_t r, auto R) {
      int64_t j = 0;
      for (; j + 4 <= run.count; j += 4) dots<R.value, 4>(r, run.at + j, run.keys + j * stride, stride, run.keys_ahead);
      for (; j < run.count; ++j) dots<R.value, 1>(r, run.at + j, run.keys + j * stride, stride, run.keys_ahead);
    });
  }

  // o = o * alpha + the values weighted by scores.
  void add_values(const Runs& runs, const float* alpha) const {
    for (int64_t e = 0; e < s_.Ev; e += 4 * N)
      for_rows(s_.rows, [&](int64_t r, auto R) { add_chunk<R.value>(r, e, s_.Ev - e, runs, alpha); });
  }

 private:
  template <int R, int K>
  void dots(int64_t r0, int64_t j0, const char* key, int64_t stride, int64_t ahead) const {
    F acc[R][K];
    each<R * K>([&](auto i) { acc[i / K][i % K] = V::zero(); });
    const float* q = s_.q + r0 * s_.width;
    const int64_t next = r0 == 0 ? ahead : 0;  // the first rows ask for all
    int64_t e = 0;
    for (; e + N <= s_.E; e += N) add_dots<R, K, N>(acc, q + e, key, e * kSize, stride, next, N);
    if (e < s_.E) add_dots<R, K, 0>(acc, q + e, key, e * kSize, stride, next, static_cast<int>(s_.E - e));
    store_scores<V, R, K>(acc, s_.scores + r0 * kBlock + j0);
  }

  // What n columns add; WHOLE is n where that is known.
  template <int R, int K, int WHOLE>
  THAL_INLINE void add_dots(F (&acc)[R][K], const float* q, const char* key, int64_t at, int64_t stride, int64_t ahead,
                            int n) const {
    F k[K];
    each<K>([&](auto j) {
      const char* row = key + j * stride;
      fetch_ahead(row, ahead, at);
      k[j] = WHOLE ? V::template load_as<T>(row + at) : V::template load_part<T>(row + at, n);
    });
    each<R>([&](auto r) {
      const F x = V::load(q + r * s_.width);
      each<K>([&](auto j) { acc[r][j] = V::fma(x, k[j], acc[r][j]); });
    });
  }

  template <int R>
  void add_chunk(int64_t r, int64_t e, int64_t left, const Runs& runs, const float* alpha) const {
    if (left >= 4 * N) {
      add_columns<R, 4>(r, e, runs, alpha, [](const char* p) { return V::template load_as<T>(p); });
      return;
    }
    for (; left > 0; left -= N, e += N) {
      const int w = static_cast<int>(smaller(N, left));
      add_columns<R, 1>(r, e, runs, alpha, [w](const char* p) { return V::template load_part<T>(p, w); });
    }
  }

  template <int R, int C, class Load>
  void add_columns(int64_t r0, int64_t e, const Runs& runs, const float* alpha, Load load) const {
    F acc[R][C];
    each<R * C>([&](auto i) { acc[i / C][i % C] = V::zero(); });
    for (const Run* run = runs.first; run < runs.first + runs.count; ++run) {
      const float* s = s_.scores + r0 * kBlock + run->at;
      const char* value = run->values + e * kSize;
      const int64_t next = r0 == 0 ? run->values_ahead : 0;
      for (int64_t j = 0; j < run->count; ++j, value += runs.stride) {
        F v[C];
        each<C>([&](auto c) {
          fetch_ahead(value, next, c * N * kSize);
          v[c] = load(value + c * N * kSize);
        });
        each<R>([&](auto r) {
          const F w = V::set1(s[r * kBlock + j]);
          each<C>([&](auto c) { acc[r][c] = V::fma(w, v[c], acc[r][c]); });
        });
      }
    }
    each<R * C>([&](auto i) {
      constexpr int r = i / C, c = i % C;
      float* o = s_.o + (r0 + r) * s_.value_width + e + c * N;
      V::store(o, V::fma(V::load(o), V::set1(alpha[r0 + r]), acc[r][c]));
    });
  }
};

}  // namespace
