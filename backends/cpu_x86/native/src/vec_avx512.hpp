// Vector operations on 16 float32 lanes (AVX-512 F, BW, VL, DQ; VDPBF16PS where the file is compiled for it).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "torchhal_cpu_x86.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Vec512 {
  static constexpr int N = 16;
  // 12 rows x 2 vectors = 24 accumulators, 2 panel vectors and one broadcast: 27 of 32 registers.
  static constexpr int kRows = 12;
  static constexpr bool kTiles = false;
  using T = float;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  // A float16 of memory in all lanes: spread before it is widened, it never passes through a general register.
  static F set1_half(const void* p) {
    int16_t bits;
    std::memcpy(&bits, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
  }
  // Two of them that lie side by side, by way of memory: a load spreads a number for nothing, where registers need a shuffle,
  // of which looking up has its fill (1536 columns of Q4_1, 576 rows: 44 us instead of 53).
  static void set1_halves(const void* p, F& a, F& b) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    alignas(16) float both[4];
    _mm_store_ps(both, _mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
#if defined(__GNUC__)
    __asm__ volatile("" : "+m"(both));  // or the compiler goes by way of registers after all
#endif
    a = set1(both[0]), b = set1(both[1]);
  }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  // Sums of four vectors.
  static __m128 reduce4(F a, F b, F c, F d) {
    const auto half = [](F x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
  // A pair of 16-bit numbers may lie at any even address.
  static F broadcast(const char* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof(word));
    return _mm512_castsi512_ps(_mm512_set1_epi32(word));
  }

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  // Lanes below n of a row of 32-bit words, the rest zero.
  static F load_words(const void* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }

  // Sixteen float8_e4m3fn. Their bits are those of a float16 with a smaller bias, subnormal numbers included: 2^8 is what
  // is missing. NaN, all bits of a number's magnitude, would be 480.
  static F widen_f8(__m128i bytes) {
    const __m256i h = _mm256_cvtepi8_epi16(bytes), magnitude = _mm256_set1_epi16(0x3f80);
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(h, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(half, magnitude), magnitude);
    return mul(_mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))), set1(256.0f));
  }
  template <int DT>
  static F widen_bytes(__m128i bytes) {
    if (DT == THAL_F8) return widen_f8(bytes);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  // Quants of packed weights: N bytes, and N numbers of their low or high halves less ZERO.
  using B = __m128i;
  static B load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const B*>(p)); }
  static B load_bytes(const void* p, int n) { return _mm_maskz_loadu_epi8(first(n), p); }
  // Bits MASK of each word as a number less ZERO. Where the lowest of them has weight 1 in the fraction of 2^POWER, they are
  // the number once that power is joined to them and subtracted: no shuffle, no conversion.
  template <int MASK, int POWER, int ZERO>
  static F pick(I words) {
    constexpr float base = static_cast<float>(1 << POWER);
    const I bits = _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(MASK), _mm512_castps_si512(set1(base)), 0xea);
    return sub(_mm512_castsi512_ps(bits), set1(base + ZERO));
  }
  static I load_quads(const void* p) { return _mm512_loadu_si512(p); }
  static I high_words(I x) { return _mm512_srli_epi32(x, 16); }
  static I flip_signs(I bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi32(static_cast<int>(0x80808080u))); }
  // Vectors of which x[j] holds numbers j, 4 + j, 8 + j, ... of a line, as that line.
  static void interleave(F x[4]) {
    const auto lo = [](F a, F b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
    const auto hi = [](F a, F b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
    const F a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpacklo_ps(x[2], x[3]);
    const F c = _mm512_unpackhi_ps(x[0], x[1]), d = _mm512_unpackhi_ps(x[2], x[3]);
    const F fours[] = {lo(a, b), hi(a, b), lo(c, d), hi(c, d)};  // numbers 16 l + 4 v to 16 l + 4 v + 3 in part l of fours[v]
    const F e = _mm512_shuffle_f32x4(fours[0], fours[1], 0x44), f = _mm512_shuffle_f32x4(fours[2], fours[3], 0x44);
    const F g = _mm512_shuffle_f32x4(fours[0], fours[1], 0xee), h = _mm512_shuffle_f32x4(fours[2], fours[3], 0xee);
    x[0] = _mm512_shuffle_f32x4(e, f, 0x88), x[1] = _mm512_shuffle_f32x4(e, f, 0xdd);
    x[2] = _mm512_shuffle_f32x4(g, h, 0x88), x[3] = _mm512_shuffle_f32x4(g, h, 0xdd);
  }
  template <int ZERO>
  static F widen_low(B bytes) {
    return pick<0x0f, 23, ZERO>(_mm512_cvtepu8_epi32(bytes));
  }
  template <int ZERO>
  static F widen_high(B bytes) {
    return pick<0xf0, 19, ZERO>(_mm512_cvtepu8_epi32(bytes));
  }
  // Lane i of the 16 lanes of a table for each low half i of 16 bytes, or (I = 1) for each high one.
  static constexpr bool kLooksUp = true;
  static F from(float first) { return add(set1(first), _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)); }
  template <int I>
  static F look_up(F table, B bytes) {
    const auto words = _mm512_cvtepu8_epi32(bytes);  // of which the lowest four bits choose
    return _mm512_permutexvar_ps(I ? _mm512_srli_epi32(words, 4) : words, table);
  }

  template <int DT>
  static F load_as(const void* p) {
    if (DT == THAL_F32) return _mm512_loadu_ps(p);
    if (DT == THAL_I8 || DT == THAL_F8) return widen_bytes<DT>(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return widen<DT>(h);
  }
  template <int DT>
  static F load_part(const void* p, int n) {
    if (DT == THAL_F32) return _mm512_maskz_loadu_ps(first(n), p);
    if (DT == THAL_I8 || DT == THAL_F8) return widen_bytes<DT>(_mm_maskz_loadu_epi8(first(n), p));
    return widen<DT>(_mm256_maskz_loadu_epi16(first(n), p));
  }
  template <int DT>
  static F widen(__m256i h) {
    if (DT == THAL_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static __m256i round_bf16(F x) {
    const I bits = _mm512_castps_si512(x);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I r = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
  }
  template <int DT>
  static void store_part(void* p, F x, int n) {
    if (DT == THAL_F32) _mm512_mask_storeu_ps(p, first(n), x);
    if (DT == THAL_BF16) _mm256_mask_storeu_epi16(p, first(n), round_bf16(x));
    if (DT == THAL_F16) _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // 0 where the byte is set and -inf where it is not.
  static F load_bool(const uint8_t* p, int n) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first(n), p);
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), set1(-kInf), zero());
  }

  // 2^t for t <= 0 (or NaN), within 1.3 ulp: 1 + t * p(t) is minimax on [0, 1) with the constant fixed at 1 so that
  // the largest score weighs exactly 1. VREDUCEPS and VSCALEFPS both work with floor(t); -inf gives exactly 0.
  static F exp2(F t) {
    const F r = _mm512_reduce_ps(t, 0x09);
    F p = set1(1.867130496e-03f);
    p = fma(p, r, set1(9.017029415e-03f));
    p = fma(p, r, set1(5.579991376e-02f));
    p = fma(p, r, set1(2.401644500e-01f));
    p = fma(p, r, set1(6.931513118e-01f));
    p = fma(p, r, set1(1.0f));
    return _mm512_scalef_ps(p, t);
  }

  // 2^(d * factor). Only float64 takes notice of what rounding left of the factor.
  static F exp2_product(F d, F factor, F) { return exp2(mul(d, factor)); }

  static I load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  // x where limit > key, -inf elsewhere.
  static F keep_below(F x, I limit, int32_t key) {
    return _mm512_mask_blend_ps(_mm512_cmpgt_epi32_mask(limit, _mm512_set1_epi32(key)), set1(-kInf), x);
  }
  // x where the word is not 0, -inf elsewhere.
  static F keep_set(F x, I word) { return _mm512_mask_blend_ps(_mm512_test_epi32_mask(word, word), set1(-kInf), x); }
  // s * factor + bias, and exactly -inf where the bias is -inf whatever the score is.
  static F add_bias(F s, F factor, F bias) {
    const F inf = set1(-kInf);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(bias, inf, _CMP_EQ_OQ), fma(s, factor, bias), inf);
  }
  // 0 instead of -inf, so that (-inf) - (-inf) cannot arise.
  static F finite_max(F m) {
    const F inf = set1(-kInf);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(m, inf, _CMP_EQ_OQ), m, zero());
  }
  static bool any_other(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }
  static F or_bits(F a, F b) { return _mm512_or_ps(a, b); }
  static F xor_bits(F a, F b) { return _mm512_xor_ps(a, b); }
  static bool any_bits(F a) { return _mm512_test_epi32_mask(_mm512_castps_si512(a), _mm512_castps_si512(a)) != 0; }
  static bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
  // x where w is not 0, and 0 elsewhere.
  static F where_nonzero(F w, F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(w, zero(), _CMP_NEQ_UQ), x); }
  // 1 / sum, and 0 for rows without a live key.
  static F inverse_or_zero(F sum) {
    return _mm512_mask_div_ps(zero(), _mm512_cmp_ps_mask(sum, zero(), _CMP_NEQ_UQ), set1(1.0f), sum);
  }

#if defined(__AVX512BF16__)
  static __m512bh as_pairs(F x) {
    __m512bh pairs;
    std::memcpy(&pairs, &x, sizeof(pairs));
    return pairs;
  }
  // acc + a.lo * b.lo + a.hi * b.hi for bf16 pairs held in 32-bit lanes.
  static F dot_pairs(F acc, F a, F b) {
    return _mm512_dpbf16_ps(acc, as_pairs(a), as_pairs(b));
  }
  // Rounds two float32 vectors to bf16 and interleaves them: lane i holds (lo[i], hi[i]).
  static F bf16_pairs(F lo, F hi) {
    const I order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                     20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512bh both = _mm512_cvtne2ps_pbh(hi, lo);
    I words;
    std::memcpy(&words, &both, sizeof(words));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, words));
  }
  // NQ vectors rounded to bf16, side by side.
  template <int NQ>
  static void store_bf16(void* out, const float* x) {
    const __m512bh both = _mm512_cvtne2ps_pbh(NQ == 2 ? load(x + 16) : zero(), load(x));
    std::memcpy(out, &both, NQ * 32);
  }
#endif
  static F negate_pairs(F x) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0x80008000u))));
  }
  // 16-bit rows a and b of one matrix interleaved: words (a[i], b[i]) for 16 columns.
  static F zip_rows(const void* a, const void* b, int n) {
    const __m256i low = _mm256_maskz_loadu_epi16(first(n), a);
    const __m256i high = b ? _mm256_maskz_loadu_epi16(first(n), b) : _mm256_setzero_si256();
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
  }

  static void transpose(F r[16]) {
    F t[16];
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    const auto lo = [](F a, F b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto hi = [](F a, F b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = lo(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = hi(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = lo(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = hi(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
      r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    }
  }
};

}  // namespace
