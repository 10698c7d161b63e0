// Moving operands between their strided home and the layouts the kernels read.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gemm.hpp"
#include "plan.hpp"

namespace {

using thal::Item;
using thal::Plan;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Whether elements are stored numbers times a scale.
template <int DT>
constexpr bool is_quantized() {
  return DT == THAL_I8 || DT == THAL_F8;
}

template <int DT>
constexpr int64_t size_of() {
  return DT == THAL_F64 ? 8 : DT == THAL_F32 ? 4 : is_quantized<DT>() ? 1 : 2;
}

// use(type) with the type of query and result as a constant. It is that of keys and values, but the kernels of quantised
// ones, and of the float32 that they may be widened to, serve every type.
template <int DT, class Use>
inline void with_query_type(const Plan& p, Use use) {
  if constexpr (DT == THAL_F32 || is_quantized<DT>()) {
    if (p.call.dtype == THAL_BF16) return use(std::integral_constant<int, THAL_BF16>{});
    if (p.call.dtype == THAL_F16) return use(std::integral_constant<int, THAL_F16>{});
    use(std::integral_constant<int, THAL_F32>{});
  } else {
    use(std::integral_constant<int, DT>{});
  }
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class V, int DT>
inline Real<V> scalar(const char* p) {
  if constexpr (DT == THAL_F64) {
    double x;
    std::memcpy(&x, p, 8);
    return x;
  } else if constexpr (DT == THAL_F32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  } else if constexpr (is_quantized<DT>()) {
    return V::reduce_add(V::template load_part<DT>(p, 1));
  } else {
    uint16_t h;
    std::memcpy(&h, p, 2);
    if constexpr (DT == THAL_BF16) return float_of_bits(static_cast<uint32_t>(h) << 16);
    return _cvtsh_ss(h);
  }
}

// A row with elements `stride` apart as a contiguous one: itself, or its copy in `buffer`.
template <int64_t SIZE>
inline const char* contiguous_row(const char* row, int64_t stride, int64_t n, char* buffer) {
  if (stride == 1) return row;
  for (int64_t i = 0; i < n; ++i) std::memcpy(buffer + i * SIZE, row + i * stride * SIZE, SIZE);
  return buffer;
}

// n rows widened to contiguous float32 rows of `columns`.
template <class V, int DT>
void widen_rows(const char* src, const int64_t* stride, int64_t n, int64_t columns, Real<V>* dst, char* buffer) {
  constexpr int64_t size = size_of<DT>();
  for (int64_t j = 0; j < n; ++j, dst += columns) {
    const char* row = contiguous_row<size>(src + j * stride[2] * size, stride[3], columns, buffer);
    int64_t e = 0;
    for (; e + V::N <= columns; e += V::N) V::store(dst + e, V::template load_as<DT>(row + e * size));
    if (e < columns) {
      const int rest = static_cast<int>(columns - e);
      V::template store_part<real_type<V>()>(dst + e, V::template load_part<DT>(row + e * size, rest), rest);
    }
  }
}

// 32-bit words of a packed row of bf16: pairs, and whole tiles of them where V multiplies tiles.
template <class V>
int64_t pair_words(int64_t columns) {
  return V::kTiles ? (columns + 31) / 32 * 16 : (columns + 1) / 2;
}

// Whether n contiguous rows of bf16 are what the products read: a tile is 16 of them and 32 columns.
template <class V>
bool are_pair_rows(int64_t n, int64_t columns) {
  return V::kTiles ? n % 16 == 0 && columns % 32 == 0 : columns % 2 == 0;
}

// n bf16 rows copied into rows of `pairs` 32-bit words, what is past the last column zero.
inline void copy_pair_rows(const char* src, const int64_t* stride, int64_t n, int64_t columns, int64_t pairs, char* dst) {
  for (int64_t j = 0; j < n; ++j, dst += pairs * 4) {
    const char* row = src + j * stride[2] * 2;
    std::memset(dst + columns * 2, 0, static_cast<size_t>(pairs * 2 - columns) * 2);
    if (stride[3] == 1) {
      std::memcpy(dst, row, static_cast<size_t>(columns) * 2);
    } else {
      contiguous_row<2>(row, stride[3], columns, dst);
    }
  }
}

// bf16 rows 2i and 2i + 1 interleaved into one row of `columns` 32-bit words; a missing last row counts as zero.
template <class V>
void zip_value_rows(const char* src, const int64_t* stride, int64_t n, int64_t columns, float* dst, char* buffer) {
  for (int64_t j = 0; j < n; j += 2, dst += columns) {
    const char* a = contiguous_row<2>(src + j * stride[2] * 2, stride[3], columns, buffer);
    const char* b =
        j + 1 < n ? contiguous_row<2>(src + (j + 1) * stride[2] * 2, stride[3], columns, buffer + columns * 2) : nullptr;
    for (int64_t e = 0; e < columns; e += V::N) {
      const int w = static_cast<int>(smaller(V::N, columns - e));
      const auto words = V::zip_rows(a + e * 2, b ? b + e * 2 : nullptr, w);
      V::template store_part<THAL_F32>(dst + e, words, w);
    }
  }
}

// V^T of a block, for tiles: row e holds the values of kTileKeys keys, zero past the n-th up to a whole tile of 32. Rows are
// as many as make tiles.
template <class V>
void transpose_values(const char* src, const int64_t* stride, int64_t n, int64_t columns, float* dst, char* buffer) {
  constexpr int64_t kWords = V::kTileKeys / 2;
  for (int64_t j = 0; j < n; j += 32) {
    const char* rows[32];
    for (int64_t i = 0; i < 32; ++i)
      rows[i] = j + i < n ? contiguous_row<2>(src + (j + i) * stride[2] * 2, stride[3], columns, buffer + i * columns * 2)
                          : nullptr;
    for (int64_t e = 0; e < columns; e += V::N) {
      const int w = static_cast<int>(smaller(V::N, columns - e));
      typename V::F t[V::N];
      for (int i = 0; i < V::N; ++i) {
        const char *a = rows[2 * i], *b = rows[2 * i + 1];
        t[i] = a ? V::zip_rows(a + e * 2, b ? b + e * 2 : nullptr, w) : V::zero();
      }
      V::transpose(t);
      for (int i = 0; i < V::N; ++i) V::store(dst + (e + i) * kWords + j / 2, t[i]);
    }
  }
}

// A block's bf16 values as the product of pairs reads them, and how many 32-bit words that is.
template <class V>
void pack_value_pairs(const char* src, const int64_t* stride, int64_t n, int64_t columns, float* dst, char* buffer) {
  if constexpr (V::kTiles) {
    transpose_values<V>(src, stride, n, columns, dst, buffer);
  } else {
    zip_value_rows<V>(src, stride, n, columns, dst, buffer);
  }
}
template <class V>
int64_t value_pair_words(int64_t n, int64_t columns) {
  if constexpr (V::kTiles) return (columns + V::N - 1) / V::N * V::N * V::kTileKeys / 2;
  return (n + 1) / 2 * columns;
}

// Keys whose values one step of the product reads together.
template <class V, bool PAIRS>
constexpr int64_t keys_per_step() {
  return !PAIRS ? 1 : V::kTiles ? 32 : 2;
}

template <class V, int DT>
bool all_finite(const char* src, const int64_t* stride, int64_t n, int64_t columns, char* buffer) {
  constexpr int64_t size = size_of<DT>();
  if (DT == THAL_I8) return true;
  typename V::F seen = V::zero();  // x * 0 is NaN exactly for infinities and NaN
  for (int64_t j = 0; j < n; ++j) {
    const char* row = contiguous_row<size>(src + j * stride[2] * size, stride[3], columns, buffer);
    for (int64_t e = 0; e < columns; e += V::N) {
      const int w = static_cast<int>(smaller(V::N, columns - e));
      seen = V::fma(V::template load_part<DT>(row + e * size, w), V::zero(), seen);
    }
  }
  return !V::any_nan(seen);
}

template <class T>
inline bool is_finite(T x) {
  return x - x == T(0);
}

// 0 in place of what is not finite: 0 * NaN must not reach a row for which the key is masked.
template <class T>
inline void zero_wild(T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!is_finite(x[i])) x[i] = T(0);
}

// The same for n words, float32 or pairs of bf16.
template <bool PAIRS, class T>
inline void clean(T* x, int64_t n) {
  if constexpr (!PAIRS) {
    zero_wild(x, n);
  } else {
    auto* halves = reinterpret_cast<uint16_t*>(x);
    for (int64_t i = 0; i < 2 * n; ++i)
      if ((halves[i] & 0x7f80) == 0x7f80) halves[i] = 0;
  }
}

// Words k .. k + N of one query row, multiplied by `factor` (1, -1, or a scale that is 0 or not finite: exact in bf16).
template <class V, int DT, bool PAIRS>
inline typename V::F query_words(const char* row, int64_t k, int64_t columns, Real<V> factor) {
  const typename V::F f = V::set1(factor);
  if constexpr (!PAIRS) {
    const int w = static_cast<int>(smaller(V::N, columns - k));
    return V::mul(V::template load_part<DT>(row + k * size_of<DT>(), w), f);
  } else {
    if (columns % 2 == 0 && (factor == 1.0f || factor == -1.0f)) {
      const typename V::F pairs = V::load_words(row + k * 4, static_cast<int>(smaller(V::N, columns / 2 - k)));
      return factor < 0 ? V::negate_pairs(pairs) : pairs;
    }
    alignas(64) uint32_t words[V::N];
    for (int i = 0; i < V::N; ++i) {
      uint16_t pair[2] = {0, 0};
      for (int h = 0; h < 2; ++h) {
        const int64_t e = 2 * (k + i) + h;
        if (e >= columns) continue;
        const float x = scalar<V, DT>(row + e * 2) * factor;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        pair[h] = static_cast<uint16_t>(bits >> 16);
      }
      words[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return V::load(reinterpret_cast<const float*>(words));
  }
}

// One panel of rows that are queries, or belong to one: words[k * NQ * N + lane] is row (row0 + lane), float32 column k
// or bf16 columns 2k, 2k + 1. Rows past the end are zero, and so is what pads columns. `first` is where the sequence begins, in elements.
template <class V, int DT, bool PAIRS, int NQ>
void pack_panel(const Plan& p, const Item& it, const Plan::Panel& source, int64_t first, int64_t row0, Real<V>* panel,
                char* buffer) {
  constexpr int64_t size = size_of<DT>();
  const int64_t columns = source.columns, words = PAIRS ? pair_words<V>(columns) : columns;
  const char* base = static_cast<const char*>(source.data) + first * size;
  for (int half = 0; half < NQ; ++half) {
    const char* rows[V::N];
    for (int i = 0; i < V::N; ++i) {
      const int64_t r = row0 + half * V::N + i;
      rows[i] = nullptr;
      if (r >= it.row0 + it.rows) continue;
      const int64_t l = r / p.group, h = it.kv_head * p.group + r % p.group;
      const char* row = base + (h * source.stride[1] + l * source.stride[2]) * size;
      rows[i] = contiguous_row<size>(row, source.stride[3], columns, buffer + i * (columns + 1) * size);
    }
    for (int64_t k = 0; k < words; k += V::N) {
      typename V::F t[V::N];
      for (int i = 0; i < V::N; ++i)
        t[i] = rows[i] ? query_words<V, DT, PAIRS>(rows[i], k, columns, source.factor) : V::zero();
      V::transpose(t);
      const int w = static_cast<int>(smaller(V::N, words - k));
      for (int i = 0; i < w; ++i) V::store(panel + ((k + i) * NQ + half) * V::N, t[i]);
    }
  }
}

template <class V, int DT, bool PAIRS, int NQ>
void pack_query(const Plan& p, const Item& it, int64_t row0, Real<V>* panel, char* buffer) {
  const Plan::Panel query{p.call.q, p.call.q_stride, p.call.E, p.query_factor};
  pack_panel<V, DT, PAIRS, NQ>(p, it, query, it.sequence.q, row0, panel, buffer);
}

}  // namespace
