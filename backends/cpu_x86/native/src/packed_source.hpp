// A packed weight, or its transpose, as the right operand of a product: a panel is dequantised when it is packed, so that no
// dequantised copy of the weight ever exists.
#pragma once

#include "matmul_pack.hpp"
#include "packed_lines.hpp"

namespace {

// A little more than a power of two, so that the lines of a panel do not fall into the same cache sets.
constexpr int64_t kLinePitch = thal::kDepthMost + 16;
constexpr int64_t kPanelMost = 32;

template <class V, int SCHEME>
void fill_packed(const void* context, const thal::PanelBlock& block, int64_t width, void* panel, char* buffer) {
  const thal_packed& w = *static_cast<const thal_packed*>(context);
  Real<V>* to = static_cast<Real<V>*>(panel);
  if (kBlocks<SCHEME> == (w.transposed != 0)) {  // the panel's rows are lines
    for (int64_t k = 0; k < block.depth; ++k, to += width) {
      decode_line<V, SCHEME>(w, block.k0 + k, block.n0, block.columns, to);
      fill(to + block.columns, width - block.columns, Real<V>(0));
    }
    return;
  }
  Real<V>* lines = reinterpret_cast<Real<V>*>(buffer);
  for (int64_t n = 0; n < block.columns; ++n)
    decode_line<V, SCHEME>(w, block.n0 + n, block.k0, block.depth, lines + n * kLinePitch);
  widen<V, real_type<V>()>({buffer, 1, kLinePitch}, block.depth, block.columns, width, to, buffer);
}

template <class V>
thal::PanelSource packed_source(const thal_packed& w) {
  thal::PanelSource source{nullptr, &w, kPanelMost * kLinePitch * static_cast<int64_t>(sizeof(Real<V>))};
  by_scheme(w.scheme, [&](auto scheme) { source.fill = fill_packed<V, decltype(scheme)::value>; });
  return source;
}

// Of b, whatever it is.
template <class V>
thal::PanelSource right_source(const MatmulPlan& p) {
  return p.call.packed ? packed_source<V>(*p.call.packed) : plain_source<V>(p);
}

}  // namespace
