// Vector operations on 8 float64 lanes (AVX-512 F, VL, DQ): what the tile kernels ask of a vector class.
#pragma once

#include "vec_f64.hpp"

namespace {

struct Vec512d {
  static constexpr int N = 8;
  static constexpr int kRows = 12;  // as Vec512 has it
  static constexpr bool kTiles = false;
  using T = double;
  using F = __m512d;
  using I = __m256i;

  static F zero() { return _mm512_setzero_pd(); }
  static F set1(double x) { return _mm512_set1_pd(x); }
  static F load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, F x) { _mm512_storeu_pd(p, x); }
  static F add(F a, F b) { return _mm512_add_pd(a, b); }
  static F sub(F a, F b) { return _mm512_sub_pd(a, b); }
  static F mul(F a, F b) { return _mm512_mul_pd(a, b); }
  static F div(F a, F b) { return _mm512_div_pd(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_pd(a, b, c); }
  static F max(F a, F b) { return _mm512_max_pd(a, b); }
  static double reduce_add(F x) { return _mm512_reduce_add_pd(x); }
  static F broadcast(const char* p) { return set1(load_element<double>(p)); }

  static __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  template <int DT>
  static F load_as(const void* p) {
    return load_part<DT>(p, N);
  }
  template <int DT>
  static F load_part(const void* p, int n) {
    if constexpr (DT == THAL_F64) {
      return _mm512_maskz_loadu_pd(first(n), p);
    } else {
      alignas(64) double x[N];
      widen_elements<DT>(p, n, N, x);
      return load(x);
    }
  }
  template <int DT>
  static void store_part(void* p, F x, int n) {
    static_assert(DT == THAL_F64, "results are of the type that is computed with");
    _mm512_mask_storeu_pd(p, first(n), x);
  }
  static F load_bool(const uint8_t* p, int n) {
    alignas(64) double x[N];
    biases_of_bytes(p, n, N, x);
    return load(x);
  }

  static F exp2(F t) { return _mm512_scalef_pd(exp2_fraction<Vec512d>(_mm512_reduce_pd(t, 0x08)), round(t)); }
  static F round(F t) { return _mm512_roundscale_pd(t, 0x08); }

  // 2^(d * factor), with the rounding errors of factor and product made good; nothing is left to correct of 0.
  static F exp2_product(F d, F factor, F rest) {
    const F t = mul(d, factor), power = exp2(t), missing = fma(d, rest, fma(d, factor, sub(zero(), t)));
    return where_nonzero(power, fma(power, mul(missing, set1(0.69314718055994530942)), power));
  }

  static I load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static F keep_below(F x, I limit, int32_t key) {
    return _mm512_mask_blend_pd(_mm256_cmpgt_epi32_mask(limit, _mm256_set1_epi32(key)), set1(-kInf), x);
  }
  static F keep_set(F x, I word) { return _mm512_mask_blend_pd(_mm256_test_epi32_mask(word, word), set1(-kInf), x); }
  static F add_bias(F s, F factor, F bias) {
    const F inf = set1(-kInf);
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(bias, inf, _CMP_EQ_OQ), fma(s, factor, bias), inf);
  }
  static F finite_max(F m) { return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(m, set1(-kInf), _CMP_EQ_OQ), m, zero()); }
  static F or_bits(F a, F b) { return _mm512_or_pd(a, b); }
  static F xor_bits(F a, F b) { return _mm512_xor_pd(a, b); }
  static bool any_bits(F a) { return _mm512_test_epi64_mask(_mm512_castpd_si512(a), _mm512_castpd_si512(a)) != 0; }
  static bool any_nan(F a) { return _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q) != 0; }
  static F where_nonzero(F w, F x) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(w, zero(), _CMP_NEQ_UQ), x); }
  static F inverse_or_zero(F sum) {
    return _mm512_mask_div_pd(zero(), _mm512_cmp_pd_mask(sum, zero(), _CMP_NEQ_UQ), set1(1.0), sum);
  }
  static void transpose(F r[N]) { transpose_by_element<Vec512d>(r); }
};

}  // namespace
