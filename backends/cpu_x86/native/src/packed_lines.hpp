// Lines of packed weights as numbers: elements that lie side by side in memory, along a row, or down a column of blocks.
#pragma once

#include "packed.hpp"
#include "pack.hpp"

namespace {

using thal::block_bytes;
using thal::kBlockElements;

template <int SCHEME>
constexpr bool kBlocks = SCHEME >= THAL_PACKED_Q4_0;

// f with a scheme as a constant.
template <class F>
void by_scheme(int32_t scheme, F f) {
  switch (scheme) {
    case THAL_PACKED_I8:
      return f(std::integral_constant<int, THAL_PACKED_I8>());
    case THAL_PACKED_I4:
      return f(std::integral_constant<int, THAL_PACKED_I4>());
    case THAL_PACKED_Q4_0:
      return f(std::integral_constant<int, THAL_PACKED_Q4_0>());
    case THAL_PACKED_Q4_1:
      return f(std::integral_constant<int, THAL_PACKED_Q4_1>());
    default:
      return f(std::integral_constant<int, THAL_PACKED_Q8_0>());
  }
}

inline float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return _cvtsh_ss(bits);
}

// A block's scale, minimum and quants.
template <int SCHEME>
struct Block {
  const uint8_t* data;
  float scale() const { return half_at(data); }
  float minimum() const { return SCHEME == THAL_PACKED_Q4_1 ? half_at(data + 2) : 0.0f; }
  template <class V>
  THAL_INLINE typename V::F scales() const {
    return V::set1_half(data);
  }
  const uint8_t* quants() const { return data + (SCHEME == THAL_PACKED_Q4_1 ? 4 : 2); }

  // Quants i * N to (i + 1) * N, less the 8 that those of Q4_0 are too large.
  template <class V, int I>
  THAL_INLINE typename V::F numbers() const {
    constexpr int at = I * V::N, zero = SCHEME == THAL_PACKED_Q4_0 ? 8 : 0;
    if constexpr (SCHEME == THAL_PACKED_Q8_0) return V::template load_as<THAL_I8>(quants() + at);
    else if constexpr (at < 16) return V::template widen_low<zero>(V::load_bytes(quants() + at));
    else return V::template widen_high<zero>(V::load_bytes(quants() + at - 16));
  }
  template <class V>
  THAL_INLINE typename V::F scaled(typename V::F number, typename V::F scale, typename V::F minimum) const {
    return SCHEME == THAL_PACKED_Q4_1 ? V::fma(number, scale, minimum) : V::mul(number, scale);
  }

  int number(int64_t i) const {
    if (SCHEME == THAL_PACKED_Q8_0) return static_cast<int8_t>(quants()[i]);
    const int byte = quants()[i % 16];
    return (i < 16 ? byte & 15 : byte >> 4) - (SCHEME == THAL_PACKED_Q4_0 ? 8 : 0);
  }
};

// The numbers of a block, a vector at a time. Where a vector holds all 16 that four bits can stand for, they are computed once
// and looked up, instead of computing each.
template <class V, int SCHEME>
class BlockNumbers {
  using F = typename V::F;
  const Block<SCHEME>& block_;
  F scale_, minimum_;  // or all 16 numbers, and nothing

 public:
  static constexpr bool kLookedUp = V::kLooksUp && SCHEME != THAL_PACKED_Q8_0;

  THAL_INLINE explicit BlockNumbers(const Block<SCHEME>& block) : block_(block) {
    if constexpr (SCHEME == THAL_PACKED_Q4_1) V::set1_halves(block.data, scale_, minimum_);
    else scale_ = block.template scales<V>(), minimum_ = V::zero();
    if constexpr (kLookedUp) scale_ = block.template scaled<V>(V::from(SCHEME == THAL_PACKED_Q4_0 ? -8.0f : 0.0f), scale_, minimum_);
  }
  template <int I>
  THAL_INLINE F get() const {
    if constexpr (kLookedUp) return V::template look_up<I>(scale_, V::load_bytes(block_.quants()));
    else return block_.template scaled<V>(block_.template numbers<V, I>(), scale_, minimum_);
  }
};

template <class V, int SCHEME>
void decode_block(const Block<SCHEME>& block, Real<V>* out) {
  if constexpr (sizeof(Real<V>) == 8) {
    const double scale = block.scale(), minimum = block.minimum();
    for (int64_t i = 0; i < kBlockElements; ++i) out[i] = block.number(i) * scale + minimum;
  } else {
    const BlockNumbers<V, SCHEME> numbers(block);
    each<kBlockElements / V::N>([&](auto i) { V::store(out + i * V::N, numbers.template get<decltype(i)::value>()); });
  }
}

// Rows [first, first + count) of column `line`.
template <class V, int SCHEME>
void decode_blocks(const thal_packed& w, int64_t line, int64_t first, int64_t count, Real<V>* out) {
  const auto* data = static_cast<const uint8_t*>(w.data) + line * thal::line_bytes(w);
  for (int64_t i = first, last = first + count; i < last;) {
    const int64_t at = i % kBlockElements, some = smaller(kBlockElements - at, last - i);
    const Block<SCHEME> block{data + i / kBlockElements * block_bytes(SCHEME)};
    if (some == kBlockElements) {
      decode_block<V>(block, out);
    } else {
      alignas(64) Real<V> whole[kBlockElements];
      decode_block<V>(block, whole);
      for (int64_t j = 0; j < some; ++j) out[j] = whole[at + j];
    }
    i += some, out += some;
  }
}

// Columns [first, first + count) of row `line`.
template <class V, int SCHEME>
void decode_row(const thal_packed& w, int64_t line, int64_t first, int64_t count, Real<V>* out) {
  const int64_t group = line / w.group * w.columns + first;
  const float *scale = w.scale + group, *zero = w.zero ? w.zero + group : nullptr;
  constexpr bool halves = SCHEME == THAL_PACKED_I4;
  const auto* data = static_cast<const uint8_t*>(w.data) + (halves ? line / 2 : line) * w.columns + first;
  if constexpr (sizeof(Real<V>) == 8) {
    for (int64_t j = 0; j < count; ++j) {
      const int q = halves ? (line % 2 ? data[j] >> 4 : data[j] & 15) - 8 : static_cast<int8_t>(data[j]);
      out[j] = (q - (zero ? static_cast<double>(zero[j]) : 0.0)) * static_cast<double>(scale[j]);
    }
  } else {
    for (int64_t j = 0; j < count; j += V::N) {
      const int n = static_cast<int>(smaller(V::N, count - j));
      const auto bytes = n == V::N ? V::load_bytes(data + j) : V::load_bytes(data + j, n);
      auto x = !halves ? V::template widen_bytes<THAL_I8>(bytes)
               : line % 2 ? V::template widen_high<8>(bytes) : V::template widen_low<8>(bytes);
      if (zero) x = V::sub(x, V::template load_part<THAL_F32>(zero + j, n));
      V::template store_part<THAL_F32>(out + j, V::mul(x, V::template load_part<THAL_F32>(scale + j, n)), n);
    }
  }
}

template <class V, int SCHEME>
void decode_line(const thal_packed& w, int64_t line, int64_t first, int64_t count, Real<V>* out) {
  if constexpr (kBlocks<SCHEME>) decode_blocks<V, SCHEME>(w, line, first, count, out);
  else decode_row<V, SCHEME>(w, line, first, count, out);
}

}  // namespace
