// AMX's tile unit in plain C++, for tests on processors without one: the same operations on the same bytes, the sums in the
// order in which TDPBF16PS forms them, with its treatment of subnormal numbers. Use without a configuration ends the
// program, as it does on the processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "gemm.hpp"

namespace {

struct EmulatedTiles {
  static void configure() { unit().configured = true; }
  static void release() { unit() = Unit(); }

  template <int T>
  static void zero() {
    std::memset(tile(T), 0, sizeof(unit().words[T]));
  }
  template <int T>
  static void load(const void* rows, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(tile(T)[i], static_cast<const char*>(rows) + i * stride, 64);
  }
  template <int T>
  static void store(void* rows, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(rows) + i * stride, tile(T)[i], 64);
  }
  template <int SUMS, int A, int B>
  static void multiply() {
    const auto *a = tile(A), *b = tile(B);
    auto* sums = tile(SUMS);
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float low = 0.0f, high = 0.0f;
        for (int k = 0; k < 16; ++k) {
          low = flushed(std::fma(value(a[m][k] << 16), value(b[k][n] << 16), low));
          high = flushed(std::fma(value(a[m][k] & 0xffff0000u), value(b[k][n] & 0xffff0000u), high));
        }
        const float sum = flushed(value(sums[m][n]) + flushed(low + high));
        std::memcpy(&sums[m][n], &sum, 4);
      }
  }

 private:
  struct Unit {
    bool configured = false;
    uint32_t words[8][16][16] = {};
  };
  static Unit& unit() {
    static thread_local Unit one;
    return one;
  }
  static uint32_t (*tile(int t))[16] {
    if (!unit().configured) std::abort();
    return unit().words[t];
  }
  static float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
  static float value(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return flushed(x);
  }
};

}  // namespace
