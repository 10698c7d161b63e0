// Vector operations on 4 float64 lanes (AVX2 and FMA): what the tile kernels ask of a vector class.
#pragma once

#include "vec_f64.hpp"

namespace {

struct Vec256d {
  static constexpr int N = 4;
  static constexpr int kRows = 6;  // as Vec256 has it
  static constexpr bool kTiles = false;
  using T = double;
  using F = __m256d;
  using I = __m128i;

  static F zero() { return _mm256_setzero_pd(); }
  static F set1(double x) { return _mm256_set1_pd(x); }
  static F load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, F x) { _mm256_storeu_pd(p, x); }
  static F add(F a, F b) { return _mm256_add_pd(a, b); }
  static F sub(F a, F b) { return _mm256_sub_pd(a, b); }
  static F mul(F a, F b) { return _mm256_mul_pd(a, b); }
  static F div(F a, F b) { return _mm256_div_pd(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_pd(a, b, c); }
  static F max(F a, F b) { return _mm256_max_pd(a, b); }
  static double reduce_add(F x) {
    alignas(32) double e[N];
    store(e, x);
    return (e[0] + e[1]) + (e[2] + e[3]);
  }
  static F broadcast(const char* p) { return set1(load_element<double>(p)); }

  static __m256i first(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_set_epi64x(3, 2, 1, 0)); }
  template <int DT>
  static F load_as(const void* p) {
    return load_part<DT>(p, N);
  }
  template <int DT>
  static F load_part(const void* p, int n) {
    if constexpr (DT == THAL_F64) {
      return _mm256_maskload_pd(static_cast<const double*>(p), first(n));
    } else {
      alignas(32) double x[N];
      widen_elements<DT>(p, n, N, x);
      return load(x);
    }
  }
  template <int DT>
  static void store_part(void* p, F x, int n) {
    static_assert(DT == THAL_F64, "results are of the type that is computed with");
    _mm256_maskstore_pd(static_cast<double*>(p), first(n), x);
  }
  static F load_bool(const uint8_t* p, int n) {
    alignas(32) double x[N];
    biases_of_bytes(p, n, N, x);
    return load(x);
  }

  // Results below 2^-1022 become 0, see Vec256::exp2.
  static F exp2(F t) {
    t = _mm256_max_pd(set1(-1023.0), t);
    const F n = _mm256_round_pd(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i power = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
    return mul(exp2_fraction<Vec256d>(sub(t, n)), _mm256_castsi256_pd(_mm256_slli_epi64(power, 52)));
  }

  // 2^(d * factor), with the rounding errors of factor and product made good; nothing is left to correct of 0.
  static F exp2_product(F d, F factor, F rest) {
    const F t = mul(d, factor), power = exp2(t), missing = fma(d, rest, fma(d, factor, sub(zero(), t)));
    return where_nonzero(power, fma(power, mul(missing, set1(0.69314718055994530942)), power));
  }

  static I load_int(const int32_t* p) { return _mm_loadu_si128(reinterpret_cast<const I*>(p)); }
  static F select(I words, F set, F clear) {
    return _mm256_blendv_pd(clear, set, _mm256_castsi256_pd(_mm256_cvtepi32_epi64(words)));
  }
  static F keep_below(F x, I limit, int32_t key) {
    return select(_mm_cmpgt_epi32(limit, _mm_set1_epi32(key)), x, set1(-kInf));
  }
  static F keep_set(F x, I word) { return select(_mm_cmpeq_epi32(word, _mm_setzero_si128()), set1(-kInf), x); }
  static F add_bias(F s, F factor, F bias) {
    const F inf = set1(-kInf);
    return _mm256_blendv_pd(fma(s, factor, bias), inf, _mm256_cmp_pd(bias, inf, _CMP_EQ_OQ));
  }
  static F finite_max(F m) { return _mm256_andnot_pd(_mm256_cmp_pd(m, set1(-kInf), _CMP_EQ_OQ), m); }
  static F or_bits(F a, F b) { return _mm256_or_pd(a, b); }
  static F xor_bits(F a, F b) { return _mm256_xor_pd(a, b); }
  static bool any_bits(F a) { return !_mm256_testz_si256(_mm256_castpd_si256(a), _mm256_castpd_si256(a)); }
  static bool any_nan(F a) { return _mm256_movemask_pd(_mm256_cmp_pd(a, a, _CMP_UNORD_Q)) != 0; }
  static F where_nonzero(F w, F x) { return _mm256_and_pd(_mm256_cmp_pd(w, zero(), _CMP_NEQ_UQ), x); }
  static F inverse_or_zero(F sum) {
    return _mm256_and_pd(_mm256_cmp_pd(sum, zero(), _CMP_NEQ_UQ), div(set1(1.0), sum));
  }
  static void transpose(F r[N]) { transpose_by_element<Vec256d>(r); }
};

}  // namespace
