// Which weights dropout keeps: Philox4x32-10 of the seed and the place of a pair of query and key, as
// torchhal.reference.dropout defines it. Four neighbouring keys share one evaluation.
#pragma once

#include <cstdint>

#include "plan.hpp"

namespace {

constexpr int kPhiloxLanes = 16;

// words[w][i] of the counters (c0[i], c1[i], c2[i], c3). Salmon et al., SC 2011, doi:10.1145/2063384.2063405.
inline void philox(const uint32_t* c0, const uint32_t* c1, const uint32_t* c2, uint32_t c3, uint64_t seed,
                   uint32_t words[4][kPhiloxLanes]) {
  for (int i = 0; i < kPhiloxLanes; ++i) {
    uint32_t a = c0[i], b = c1[i], c = c2[i], d = c3;
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t left = uint64_t{0xD2511F53} * a, right = uint64_t{0xCD9E8D57} * c;
      a = static_cast<uint32_t>(right >> 32) ^ b ^ k0;
      b = static_cast<uint32_t>(right);
      c = static_cast<uint32_t>(left >> 32) ^ d ^ k1;
      d = static_cast<uint32_t>(left);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[0][i] = a, words[1][i] = b, words[2][i] = c, words[3][i] = d;
  }
}

// Lanes are query rows: f(key - key0, words) for the keys [key0, key0 + n) and 16 rows at `heads` and `positions`.
template <class F>
void draw_for_rows(const thal_dropout& drop, int64_t batch, const int32_t* heads, const int32_t* positions, int64_t key0,
                   int64_t n, F f) {
  uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], words[4][kPhiloxLanes];
  for (int i = 0; i < kPhiloxLanes; ++i)
    c1[i] = static_cast<uint32_t>(positions[i]), c2[i] = static_cast<uint32_t>(heads[i]);
  for (int64_t group = key0 >> 2; group <= (key0 + n - 1) >> 2; ++group) {
    for (uint32_t& c : c0) c = static_cast<uint32_t>(group);
    philox(c0, c1, c2, static_cast<uint32_t>(batch), drop.seed, words);
    for (int64_t w = 0; w < 4; ++w) {
      const int64_t j = group * 4 + w - key0;
      if (j >= 0 && j < n) f(j, words[w]);
    }
  }
}

// Lanes are groups of four keys: f(key - key0, word) for the keys [key0, key0 + n) and one row.
template <class F>
void draw_for_keys(const thal_dropout& drop, int64_t batch, int32_t head, int32_t position, int64_t key0, int64_t n, F f) {
  uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], words[4][kPhiloxLanes];
  for (int i = 0; i < kPhiloxLanes; ++i) c1[i] = static_cast<uint32_t>(position), c2[i] = static_cast<uint32_t>(head);
  for (int64_t group = key0 >> 2; group <= (key0 + n - 1) >> 2; group += kPhiloxLanes) {
    for (int i = 0; i < kPhiloxLanes; ++i) c0[i] = static_cast<uint32_t>(group + i);
    philox(c0, c1, c2, static_cast<uint32_t>(batch), drop.seed, words);
    for (int64_t k = 0; k < 4 * kPhiloxLanes; ++k) {
      const int64_t j = group * 4 + k - key0;
      if (j >= 0 && j < n) f(j, words[k & 3][k >> 2]);
    }
  }
}

}  // namespace
