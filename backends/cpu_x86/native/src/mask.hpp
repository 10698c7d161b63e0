// Masks and causal limits, as additive biases laid out like the scores of a panel.
#pragma once

#include "pack.hpp"

namespace {

template <class V>
inline typename V::F load_mask(int32_t kind, const char* p, int n) {
  switch (kind) {
    case THAL_MASK_BOOL:
      return V::load_bool(reinterpret_cast<const uint8_t*>(p), n);
    case THAL_MASK_BF16:
      return V::template load_part<THAL_BF16>(p, n);
    case THAL_MASK_F16:
      return V::template load_part<THAL_F16>(p, n);
    case THAL_MASK_F64:
      if constexpr (real_type<V>() == THAL_F64) return V::template load_part<THAL_F64>(p, n);
      return V::zero();  // refused before
    default:
      return V::template load_part<THAL_F32>(p, n);
  }
}

inline int64_t mask_size(int32_t kind) { return kind == THAL_MASK_BOOL ? 1 : kind == THAL_MASK_F64 ? 8 : kind == THAL_MASK_F32 ? 4 : 2; }

// n <= N mask values `stride` elements apart.
template <class V>
inline typename V::F load_mask_strided(int32_t kind, const char* p, int64_t stride, int n) {
  if (stride == 1) return load_mask<V>(kind, p, n);
  alignas(64) char buffer[V::N * 8];
  const int64_t size = mask_size(kind);
  for (int i = 0; i < n; ++i) std::memcpy(buffer + i * size, p + i * stride * size, static_cast<size_t>(size));
  return load_mask<V>(kind, buffer, n);
}

inline const char* mask_row(const Plan& p, const Item& it, int64_t row) {
  const auto& c = p.call;
  const int64_t l = row / p.group, h = it.kv_head * p.group + row % p.group;
  return static_cast<const char*>(c.mask) +
         (it.sequence.mask + h * c.mask_stride[1] + l * c.mask_stride[2]) * mask_size(c.mask_kind);
}

// Number of keys row `row` may see.
inline int64_t row_limit(const Plan& p, const Item& it, int64_t row) {
  const thal::Sequence& s = it.sequence;
  return p.call.is_causal ? larger(0, smaller(s.S, s.first + row / p.group + 1)) : s.S;
}

enum class Cover { kHidden, kMixed, kOpen };  // every bias is -inf, or some are not 0, or all are 0

// bias[j * NQ * N + lane] for keys [key0, key0 + n) and the panel starting at row0; -inf where masked, by the mask or by
// the causal limit.
template <class V, int NQ>
Cover fill_bias(const Plan& p, const Item& it, int64_t row0, const int32_t* limit, int64_t key0, int64_t n,
                Real<V>* bias) {
  constexpr int W = NQ * V::N;
  const auto& c = p.call;
  const int64_t size = mask_size(c.mask_kind), last = it.row0 + it.rows - 1;
  const int64_t step = c.mask_stride[3];
  const bool uniform = c.mask_stride[1] == 0 && c.mask_stride[2] == 0;
  const typename V::F hidden = V::set1(-kInf);
  typename V::F not_hidden = V::zero(), not_open = V::zero();  // bits that differ from -inf, and from 0
  for (int half = 0; half < NQ; ++half) {
    const auto bound = V::load_int(limit + half * V::N);
    const char* rows[V::N];
    for (int i = 0; i < V::N; ++i) rows[i] = mask_row(p, it, smaller(row0 + half * V::N + i, last)) + key0 * step * size;
    for (int64_t j = 0; j < n; j += V::N) {
      const int w = static_cast<int>(smaller(V::N, n - j));
      typename V::F t[V::N];
      if (uniform) {
        alignas(64) Real<V> line[V::N];
        V::store(line, load_mask_strided<V>(c.mask_kind, rows[0] + j * step * size, step, w));
        for (int i = 0; i < w; ++i) t[i] = V::set1(line[i]);
      } else {
        for (int i = 0; i < V::N; ++i) t[i] = load_mask_strided<V>(c.mask_kind, rows[i] + j * step * size, step, w);
        V::transpose(t);
      }
      for (int i = 0; i < w; ++i) {
        const typename V::F x =
            c.is_causal ? V::keep_below(t[i], bound, static_cast<int32_t>(key0 + j + i)) : t[i];
        not_hidden = V::or_bits(not_hidden, V::xor_bits(x, hidden));
        not_open = V::or_bits(not_open, x);
        V::store(bias + (j + i) * W + half * V::N, x);
      }
    }
  }
  if (!V::any_bits(not_hidden)) return Cover::kHidden;
  return V::any_bits(not_open) ? Cover::kMixed : Cover::kOpen;
}

// The causal limit alone.
template <class V, int NQ>
void causal_bias(const int32_t* limit, int64_t key0, int64_t n, Real<V>* bias) {
  for (int64_t j = 0; j < n; ++j)
    for (int half = 0; half < NQ; ++half)
      V::store(bias + (j * NQ + half) * V::N,
               V::keep_below(V::zero(), V::load_int(limit + half * V::N), static_cast<int32_t>(key0 + j)));
}

}  // namespace
