// What the primitives compute, element by element. Written without branches where it matters, so that compilers make
// vector loops of them; functions that models seldom use call the C library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <class T>
inline T pick(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// ---------------------------------------------------------------------------- float32

// 2^n * p for whole n in [-252, 254], rounded once where the result is subnormal.
inline float scale_by_power(float p, float n) {
  const auto power = [](int32_t k) { return bits_as<float>((static_cast<uint32_t>(k) + 127u) << 23); };  // of NaN, k is any number
  const auto k = static_cast<int32_t>(n);
  const int32_t half = k >> 1;
  return p * power(half) * power(k - half);
}

// e^r - 1 on [-ln(2) / 2, ln(2) / 2]: r + r^2 * p(r), minimax, of which rounding costs more than the error of 3e-9.
inline float expm1_near_zero(float r) {
  float p = 1.381446607e-3f;
  p = std::fma(p, r, 8.368780836e-3f);
  p = std::fma(p, r, 4.166839272e-2f);
  p = std::fma(p, r, 1.666651964e-1f);
  p = std::fma(p, r, 4.999999404e-1f);
  return std::fma(p, r * r, r);
}

inline float exp_near_zero(float r) { return expm1_near_zero(r) + 1.0f; }

inline float nearest(float x) {
  constexpr float big = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits behind the point
  return (x + big) - big;
}

// x - n ln(2), with ln(2) in two parts of 24 bits.
inline float less_logarithms(float x, float n) { return std::fma(n, 1.90465430e-9f, std::fma(n, -0.693147182f, x)); }

inline float exp_of(float x) {
  const float bounded = pick(x > 89.0f, 89.0f, pick(x < -104.0f, -104.0f, x));
  const float n = nearest(bounded * 1.44269504f);
  const float r = less_logarithms(bounded, n);
  const float y = scale_by_power(exp_near_zero(r), n);
  return pick(x != x, x, y);
}

inline float exp2_of(float x) {
  const float bounded = pick(x > 129.0f, 129.0f, pick(x < -150.0f, -150.0f, x));
  const float n = nearest(bounded);
  const float y = scale_by_power(exp_near_zero((bounded - n) * 0.693147181f), n);
  return pick(x != x, x, y);
}

// Within 1 ulp: x = 2^e * m with m in [1/sqrt(2), sqrt(2)); the polynomial is that of Cephes' logf.
inline float log_of(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const float normal = pick(tiny, x * 8388608.0f, x);
  const auto word = bits_as<int32_t>(normal);
  const int32_t above = (word - 0x3f3504f3) & static_cast<int32_t>(0xff800000);
  const float e = static_cast<float>(above >> 23) - pick(tiny, 23.0f, 0.0f);
  const float f = bits_as<float>(word - above) - 1.0f;
  float p = 7.0376836292e-2f;
  p = std::fma(p, f, -1.1514610310e-1f);
  p = std::fma(p, f, 1.1676998740e-1f);
  p = std::fma(p, f, -1.2420140846e-1f);
  p = std::fma(p, f, 1.4249322787e-1f);
  p = std::fma(p, f, -1.6668057665e-1f);
  p = std::fma(p, f, 2.0000714765e-1f);
  p = std::fma(p, f, -2.4999993993e-1f);
  p = std::fma(p, f, 3.3333331174e-1f);
  const float square = f * f;
  float y = p * f * square;
  y = std::fma(e, -2.12194440e-4f, y);
  y = std::fma(-0.5f, square, y) + f;
  y = std::fma(e, 0.693359375f, y);
  constexpr float inf = std::numeric_limits<float>::infinity();
  y = pick(x == 0.0f, -inf, pick(x == inf, inf, y));
  return pick(x < 0.0f || x != x, std::numeric_limits<float>::quiet_NaN(), y);
}

// t / (t + 2) with t = e^2|x| - 1, which keeps its digits near zero: there it is the polynomial less its 1. Within 2 ulp;
// float32 sees nothing of t beyond |x| = 9.1.
inline float tanh_of(float x) {
  const float size = std::fabs(x);
  const float doubled = pick(size > 9.1f, 18.2f, 2.0f * size);
  const float n = nearest(doubled * 1.44269504f);
  const float power = bits_as<float>((static_cast<uint32_t>(static_cast<int32_t>(n)) + 127u) << 23);
  const float t = std::fma(power, expm1_near_zero(less_logarithms(doubled, n)), power - 1.0f);
  return pick(x != x, x, std::copysign(t / (t + 2.0f), x));
}

inline double exp_of(double x) { return std::exp(x); }
inline double exp2_of(double x) { return std::exp2(x); }
inline double log_of(double x) { return std::log(x); }
inline double tanh_of(double x) { return std::tanh(x); }

// ---------------------------------------------------------------------------- both floating types

// Newton's and Halley's iteration on erf, or on erfc where 1 - |y| would lose its digits; in float64 for both types.
inline double erfinv_of(double y) {
  const double size = std::fabs(y);
  if (!(size < 1.0)) return size == 1.0 ? std::copysign(std::numeric_limits<double>::infinity(), y) : std::nan("");
  if (size == 0.0) return y;
  const double log_rest = std::log1p(-size * size), a = 4.330746750799873 + log_rest / 2;  // 2 / (pi * 0.147)
  double x = std::sqrt(std::sqrt(a * a - log_rest / 0.147) - a);  // Winitzki's approximation
  for (int i = 0; i < 3; ++i) {
    const double error = size > 0.5 ? (1.0 - size) - std::erfc(x) : std::erf(x) - size;
    const double step = error / (1.1283791670955126 * std::exp(-x * x));
    x -= step / (1.0 + x * step);
  }
  return std::copysign(x, y);
}

// Python's and torch's remainder: the sign is the divisor's.
template <class T>
inline T remainder_of(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const T rest = std::fmod(a, b);
    return rest != 0 && (b < 0) != (rest < 0) ? rest + b : rest;
  } else {
    if (b == 0 || b == -1) return 0;  // undefined, and no trap
    const T rest = a % b;
    return rest != 0 && (b < 0) != (rest < 0) ? rest + b : rest;
  }
}

template <class T>
inline T negate(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return -x;
  } else {
    return static_cast<T>(std::make_unsigned_t<T>(0) - static_cast<std::make_unsigned_t<T>>(x));
  }
}

// torch's floor_divide: CPython's float_floor_div, and infinities or NaN for a divisor of zero.
template <class T>
inline T floordiv_of(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (b == 0) return a / b;
    const T rest = std::fmod(a, b);
    T quotient = (a - rest) / b;
    if (rest != 0 && (b < 0) != (rest < 0)) quotient -= 1;
    if (quotient == 0) return std::copysign(T(0), a / b);
    const T floor = std::floor(quotient);
    return quotient - floor > T(0.5) ? floor + 1 : floor;
  } else {
    if (b == 0) return 0;
    if (b == -1) return negate(a);
    const T quotient = a / b;
    return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
  }
}

template <class T>
inline T truncdiv_of(T a, T b) {
  return b == 0 ? 0 : b == -1 ? negate(a) : a / b;
}

template <class T>
inline T fmod_of(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmod(a, b);
  } else {
    return b == 0 || b == -1 ? 0 : a % b;
  }
}

template <class T>
inline T pow_of(T base, T exponent) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::pow(base, exponent);
  } else {
    using U = std::make_unsigned_t<T>;
    if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 ? -1 : 1) : 0;
    U result = 1, factor = static_cast<U>(base);
    for (T left = exponent; left; left >>= 1, factor *= factor)
      if (left & 1) result *= factor;
    return static_cast<T>(result);
  }
}

// NaN wins, as in torch.
template <class T>
inline T min_of(T a, T b) {
  return a != a ? a : b != b ? b : a < b ? a : b;
}
template <class T>
inline T max_of(T a, T b) {
  return a != a ? a : b != b ? b : a > b ? a : b;
}

// ---------------------------------------------------------------------------- 16-bit floating types, kept as float32

inline float rounded_to_bf16(float x) {
  const auto word = bits_as<uint32_t>(x);
  const uint32_t rounded = (word + 0x7fffu + (word >> 16 & 1u)) & 0xffff0000u;
  return pick(x != x, x, bits_as<float>(rounded));
}

inline float rounded_to_f16(float x) {
  const auto word = bits_as<uint32_t>(x);
  const uint32_t sign = word & 0x80000000u, size = word & 0x7fffffffu;
  const float magnitude = bits_as<float>(size);
  // Below 2^-14 the last bit stands for 2^-24: adding 0.5, whose last bit does too, rounds there.
  const float small = (magnitude + 0.5f) - 0.5f;
  const float usual = bits_as<float>((size + 0xfffu + (size >> 13 & 1u)) & 0xffffe000u);
  const float bounded = pick(usual > 65504.0f, std::numeric_limits<float>::infinity(), usual);
  const float rounded = pick(magnitude < 6.103515625e-5f, small, bounded);
  return pick(x != x, x, bits_as<float>(bits_as<uint32_t>(rounded) | sign));
}

inline float widened_bf16(uint16_t h) { return bits_as<float>(static_cast<uint32_t>(h) << 16); }

inline float widened_f16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, size = h & 0x7fffu;
  const float usual = bits_as<float>((size << 13) + 0x38000000u);
  const float small = static_cast<float>(size) * 5.9604644775390625e-8f;
  const float special = bits_as<float>((size << 13) | 0x7f800000u);
  const float magnitude = pick(size >= 0x7c00u, special, pick(size < 0x400u, small, usual));
  return bits_as<float>(bits_as<uint32_t>(magnitude) | sign);
}

}  // namespace
