// The tile unit of AMX: eight registers of 16 rows of 64 bytes, and TDPBF16PS, which multiplies bf16 pairs of two of them
// into the 16 x 16 float32 sums of a third.
//
// Written as assembly and not with the compiler's intrinsics: those take register numbers as literals only, and GCC's loads
// do not tell the optimiser that they read memory.
#pragma once

#include <cstdint>

#include "gemm.hpp"

namespace {

struct AmxTiles {
  // Every tile full: 16 rows of 64 bytes. The unit must be configured before, and released after, any other function.
  static void configure() {
    struct alignas(64) Configuration {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static constexpr Configuration kFull = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    static_assert(sizeof(Configuration) == 64, "what LDTILECFG reads");
    __asm__ volatile("ldtilecfg %0" ::"m"(kFull));
  }
  // Gives the registers back: the operating system then has no tiles to save when it switches threads.
  static void release() { __asm__ volatile("tilerelease" ::: "memory"); }

  template <int T>
  static THAL_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Sixteen rows of 64 bytes, `stride` bytes apart.
  template <int T>
  static THAL_INLINE void load(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static THAL_INLINE void store(void* rows, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(T) : "memory");
  }
  // sums[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1], over k.
  template <int SUMS, int A, int B>
  static THAL_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
};

}  // namespace
