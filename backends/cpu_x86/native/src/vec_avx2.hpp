// Vector operations on 8 float32 lanes (AVX2, FMA, F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "torchhal_cpu_x86.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Vec256 {
  static constexpr int N = 8;
  // 6 rows x 2 vectors = 12 accumulators, 2 panel vectors and one broadcast: 15 of 16 registers.
  static constexpr int kRows = 6;
  static constexpr bool kTiles = false;
  using T = float;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F set1_half(const void* p) {
    int16_t bits;
    std::memcpy(&bits, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16(bits));
  }
  static void set1_halves(const void* p, F& a, F& b) { a = set1_half(p), b = set1_half(static_cast<const char*>(p) + 2); }
  static constexpr bool kLooksUp = false;  // eight lanes are no table of 16
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static float reduce_add(F x) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  // Sums of four vectors.
  static __m128 reduce4(F a, F b, F c, F d) {
    const F s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  }
  static float reduce_max(F x) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }
  static F broadcast(const char* p) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(p)); }

  static I first(int n) {
    alignas(32) static const int32_t table[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256(reinterpret_cast<const I*>(table + 8 - n));
  }
  static F load_words(const void* p, int n) { return _mm256_maskload_ps(static_cast<const float*>(p), first(n)); }

  // Reads exactly n 16-bit values: AVX2 has no masked 16-bit load, and reading past the end may fault.
  static __m128i load_half(const void* p, int n) {
    if (n == 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
    alignas(16) uint16_t buffer[8] = {};
    std::memcpy(buffer, p, static_cast<size_t>(n) * 2);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
  }
  template <int DT>
  static F widen(__m128i h) {
    if (DT == THAL_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  // Eight float8_e4m3fn. Their bits are those of a float16 with a smaller bias, subnormal numbers included: 2^8 is what is
  // missing. NaN, all bits of a number's magnitude, would be 480.
  static F widen_f8(__m128i bytes) {
    const __m128i h = _mm_cvtepi8_epi16(bytes), magnitude = _mm_set1_epi16(0x7f);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(h, magnitude), magnitude);
    const __m128i half = _mm_and_si128(_mm_slli_epi16(h, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
    return mul(_mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)))), set1(256.0f));
  }
  template <int DT>
  static F widen_bytes(__m128i bytes) {
    if (DT == THAL_F8) return widen_f8(bytes);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  // Quants of packed weights: N bytes, and N numbers of their low or high halves less ZERO.
  using B = __m128i;
  static B load_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const B*>(p)); }
  static B load_bytes(const void* p, int n) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, p, static_cast<size_t>(n));
    return _mm_cvtsi64_si128(static_cast<long long>(bytes));
  }
  // Bits MASK of each word as a number less ZERO, see Vec512::pick.
  template <int MASK, int POWER, int ZERO>
  static F pick(I words) {
    constexpr float base = static_cast<float>(1 << POWER);
    const F bits = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(MASK)));
    return sub(or_bits(bits, set1(base)), set1(base + ZERO));
  }
  static I load_quads(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I high_words(I x) { return _mm256_srli_epi32(x, 16); }
  static I flip_signs(I bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi32(static_cast<int>(0x80808080u))); }
  // Vectors of which x[j] holds numbers j, 4 + j, 8 + j, ... of a line, as that line.
  static void interleave(F x[4]) {
    const auto lo = [](F a, F b) { return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); };
    const auto hi = [](F a, F b) { return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); };
    const F a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpacklo_ps(x[2], x[3]);
    const F c = _mm256_unpackhi_ps(x[0], x[1]), d = _mm256_unpackhi_ps(x[2], x[3]);
    const F fours[] = {lo(a, b), hi(a, b), lo(c, d), hi(c, d)};
    x[0] = _mm256_permute2f128_ps(fours[0], fours[1], 0x20), x[1] = _mm256_permute2f128_ps(fours[2], fours[3], 0x20);
    x[2] = _mm256_permute2f128_ps(fours[0], fours[1], 0x31), x[3] = _mm256_permute2f128_ps(fours[2], fours[3], 0x31);
  }
  template <int ZERO>
  static F widen_low(B bytes) {
    return pick<0x0f, 23, ZERO>(_mm256_cvtepu8_epi32(bytes));
  }
  template <int ZERO>
  static F widen_high(B bytes) {
    return pick<0xf0, 19, ZERO>(_mm256_cvtepu8_epi32(bytes));
  }

  template <int DT>
  static F load_as(const void* p) {
    if (DT == THAL_F32) return load(static_cast<const float*>(p));
    if (DT == THAL_I8 || DT == THAL_F8) return widen_bytes<DT>(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    return widen<DT>(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  template <int DT>
  static F load_part(const void* p, int n) {
    if (DT == THAL_F32) return load_words(p, n);
    if (DT == THAL_I8 || DT == THAL_F8) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, p, static_cast<size_t>(n));
      return widen_bytes<DT>(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
    }
    return widen<DT>(load_half(p, n));
  }
  static __m128i round_bf16(F x) {
    const I bits = _mm256_castps_si256(x);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    I r = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  template <int DT>
  static void store_part(void* p, F x, int n) {
    if (DT == THAL_F32) {
      _mm256_maskstore_ps(static_cast<float*>(p), first(n), x);
      return;
    }
    const __m128i h = DT == THAL_BF16 ? round_bf16(x) : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    if (n == 8) {
      _mm_storeu_si128(static_cast<__m128i*>(p), h);
      return;
    }
    alignas(16) uint16_t buffer[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), h);
    std::memcpy(p, buffer, static_cast<size_t>(n) * 2);
  }
  static F load_bool(const uint8_t* p, int n) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, p, static_cast<size_t>(n));
    const I words = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes)));
    const I off = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
    return _mm256_and_ps(_mm256_castsi256_ps(off), set1(-kInf));
  }

  // 2^t for t <= 0 (or NaN), the polynomial of Vec512::exp2. Results below 2^-126 become 0: beside a largest
  // weight of 1 they cannot be seen. The operand order of max keeps NaN.
  static F exp2(F t) {
    t = _mm256_max_ps(set1(-127.0f), t);
    const F n = _mm256_floor_ps(t);
    const F r = sub(t, n);
    F p = set1(1.867130496e-03f);
    p = fma(p, r, set1(9.017029415e-03f));
    p = fma(p, r, set1(5.579991376e-02f));
    p = fma(p, r, set1(2.401644500e-01f));
    p = fma(p, r, set1(6.931513118e-01f));
    p = fma(p, r, set1(1.0f));
    const I power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return mul(p, _mm256_castsi256_ps(power));
  }

  // 2^(d * factor). Only float64 takes notice of what rounding left of the factor.
  static F exp2_product(F d, F factor, F) { return exp2(mul(d, factor)); }

  static I load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static F keep_below(F x, I limit, int32_t key) {
    const I keep = _mm256_cmpgt_epi32(limit, _mm256_set1_epi32(key));
    return _mm256_blendv_ps(set1(-kInf), x, _mm256_castsi256_ps(keep));
  }
  // x where the word is not 0, -inf elsewhere.
  static F keep_set(F x, I word) {
    return _mm256_blendv_ps(x, set1(-kInf), _mm256_castsi256_ps(_mm256_cmpeq_epi32(word, _mm256_setzero_si256())));
  }
  static F add_bias(F s, F factor, F bias) {
    const F inf = set1(-kInf);
    return _mm256_blendv_ps(fma(s, factor, bias), inf, _mm256_cmp_ps(bias, inf, _CMP_EQ_OQ));
  }
  static F finite_max(F m) { return _mm256_andnot_ps(_mm256_cmp_ps(m, set1(-kInf), _CMP_EQ_OQ), m); }
  static bool any_other(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }
  static F or_bits(F a, F b) { return _mm256_or_ps(a, b); }
  static F xor_bits(F a, F b) { return _mm256_xor_ps(a, b); }
  static bool any_bits(F a) { return !_mm256_testz_si256(_mm256_castps_si256(a), _mm256_castps_si256(a)); }
  static bool any_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
  // x where w is not 0, and 0 elsewhere.
  static F where_nonzero(F w, F x) { return _mm256_and_ps(_mm256_cmp_ps(w, zero(), _CMP_NEQ_UQ), x); }
  static F inverse_or_zero(F sum) {
    return _mm256_and_ps(_mm256_cmp_ps(sum, zero(), _CMP_NEQ_UQ), div(set1(1.0f), sum));
  }

  static void transpose(F r[8]) {
    F t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
      t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
