// Included once per instruction set, in a file compiled with that set's flags. Everything the kernels are made of has
// internal linkage: a function the linker could share with another file might carry instructions the CPU lacks.
#pragma once

#include "attention_rows.hpp"
#include "attention_tile.hpp"
#include "gradient_tile.hpp"
#include "map_rows.hpp"
#include "matmul_tile.hpp"
#include "packed_skinny.hpp"

namespace {

// 24 or 12 independent chains of multiply-adds: enough for two ports of latency four.
template <class V>
double fma_flops(int64_t loops) {
  constexpr int kChains = 2 * V::kRows;
  typename V::F acc[kChains];
  each<kChains>([&](auto i) { acc[i] = V::set1(static_cast<float>(i)); });
  const typename V::F x = V::set1(0.999f), y = V::set1(1e-3f);
  for (int64_t l = 0; l < loops; ++l) each<kChains>([&](auto i) { acc[i] = V::fma(acc[i], x, y); });
  typename V::F total = V::zero();
  each<kChains>([&](auto i) { total = V::add(total, acc[i]); });
  const double flops = 2.0 * V::N * kChains * static_cast<double>(loops);
  return V::reduce_add(total) == 0.123f ? flops + 1.0 : flops;  // keeps the sum alive
}

}  // namespace
