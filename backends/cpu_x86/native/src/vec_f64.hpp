// What the float64 vector classes share. Tiles of float64 are for those who need its precision: elements of other types,
// which only masks have here, are widened one by one.
#pragma once

#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "torchhal_cpu_x86.h"

namespace {

template <class E>
inline E load_element(const void* p) {
  E x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// float8_e4m3fn: a sign, 4 bits of exponent with a bias of 7 and 3 of fraction; all of them set are NaN.
inline double widened_f8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 0x7f) == 0x7f) return std::numeric_limits<double>::quiet_NaN();
  const double size = exponent ? ::ldexp(8 + fraction, exponent - 10) : ::ldexp(fraction, -9);
  return bits & 0x80 ? -size : size;
}

template <int DT>
inline double widened(const char* p) {
  if constexpr (DT == THAL_F32) return static_cast<double>(load_element<float>(p));
  if constexpr (DT == THAL_I8) return static_cast<double>(load_element<int8_t>(p));
  if constexpr (DT == THAL_F8) return widened_f8(load_element<uint8_t>(p));
  const auto half = load_element<uint16_t>(p);
  if constexpr (DT == THAL_F16) return static_cast<double>(_cvtsh_ss(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  return static_cast<double>(load_element<float>(&bits));
}

// n elements of memory, and zeros up to `all`.
template <int DT>
inline void widen_elements(const void* p, int n, int all, double* out) {
  constexpr int size = DT == THAL_F32 ? 4 : DT == THAL_I8 || DT == THAL_F8 ? 1 : 2;
  for (int i = 0; i < all; ++i) out[i] = i < n ? widened<DT>(static_cast<const char*>(p) + i * size) : 0.0;
}

// 0 where a byte is set, -inf where it is not, and zeros up to `all`.
inline void biases_of_bytes(const uint8_t* p, int n, int all, double* out) {
  for (int i = 0; i < all; ++i) out[i] = i < n && !p[i] ? -std::numeric_limits<double>::infinity() : 0.0;
}

// 2^r for r in [-1/2, 1/2]: the series of exp(r log 2) to its 13th power, of which the rest is below 2^-57.
template <class V>
inline typename V::F exp2_fraction(typename V::F r) {
  constexpr double kTerms[] = {1.0,
                               0.69314718055994530942,
                               0.24022650695910071233,
                               0.055504108664821579953,
                               0.0096181291076284771620,
                               0.0013333558146428443423,
                               0.00015403530393381609954,
                               1.5252733804059840280e-05,
                               1.3215486790144309488e-06,
                               1.0178086009239699728e-07,
                               7.0549116208011233299e-09,
                               4.4455382718708114976e-10,
                               2.5678435993488205142e-11,
                               1.3691488853904128881e-12};
  typename V::F p = V::set1(kTerms[13]);
  for (int i = 12; i >= 0; --i) p = V::fma(p, r, V::set1(kTerms[i]));
  return p;
}

template <class V>
inline void transpose_by_element(typename V::F* r) {
  alignas(64) double from[V::N][V::N], to[V::N][V::N];
  for (int i = 0; i < V::N; ++i) V::store(from[i], r[i]);
  for (int i = 0; i < V::N; ++i)
    for (int j = 0; j < V::N; ++j) to[j][i] = from[i][j];
  for (int i = 0; i < V::N; ++i) r[i] = V::load(to[i]);
}

}  // namespace
