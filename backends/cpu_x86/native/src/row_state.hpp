// What is returned of a row beside its output: the logarithm of its sum, and its largest score.
#pragma once

#include <math.h>

#include <limits>

#include "plan.hpp"

namespace {

inline float natural_log(float x) { return ::logf(x); }
inline double natural_log(double x) { return ::log(x); }

// Of row i of a tile: `max` in the unit of scores as they are computed, `sum` of weights relative to it.
template <class T>
inline void store_row_state(const thal::Plan& p, const thal::Item& it, int64_t i, T max, T sum) {
  const thal_attention& c = p.call;
  if (!c.lse && !c.max_scores) return;
  const int64_t row = it.row0 + i, l = row / p.group, h = it.kv_head * p.group + row % p.group;
  const int64_t at = it.sequence.lse + h * c.lse_stride[1] + l * c.lse_stride[2];
  constexpr T inf = std::numeric_limits<T>::infinity();
  const T score = max * static_cast<T>(p.lse_factor);
  if (c.lse) static_cast<T*>(c.lse)[at] = sum == T(0) ? -inf : score + natural_log(sum);
  // A score that is no number is no maximum either, and shows in the sum alone.
  if (c.max_scores) static_cast<T*>(c.max_scores)[at] = sum == T(0) ? -inf : sum == sum ? score : sum;
}

}  // namespace
