// Which instruction sets the CPU has and the operating system saves on a context switch.
#include <cstdint>
#include <initializer_list>

#include "plan.hpp"

#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, 0);
  if (static_cast<uint32_t>(out[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(sub));
  r.a = out[0], r.b = out[1], r.c = out[2], r.d = out[3];
#else
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

bool all(uint32_t word, std::initializer_list<int> bits) {
  for (int b : bits)
    if (!(word >> b & 1)) return false;
  return true;
}

uint32_t detect() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), extended = cpuid(7, 1);
  uint32_t found = 0;
  // FMA, OSXSAVE, AVX, F16C; then AVX2. XCR0 bits 1 and 2: the upper halves of ymm registers are saved.
  if (!all(one.c, {12, 27, 28, 29}) || !all(seven.b, {5})) return found;
  const uint64_t state = saved_state();
  if ((state & 0x6) != 0x6) return found;
  found |= 1u << THAL_ISA_AVX2;
  // AVX-512 F, DQ, BW, VL; XCR0 bits 5 to 7: opmask and zmm registers are saved.
  if (!all(seven.b, {16, 17, 30, 31}) || (state & 0xe0) != 0xe0) return found;
  found |= 1u << THAL_ISA_AVX512;
  if (all(extended.a, {5})) found |= 1u << THAL_ISA_AVX512_BF16;
  return found;
}

}  // namespace

extern "C" uint32_t thal_supported_isas(void) {
  static const uint32_t found = detect();
  return found;
}

const thal::Isa* thal::find_isa(int32_t isa) {
  if (isa <= THAL_ISA_AUTO || isa >= THAL_ISAS || !(thal_supported_isas() >> isa & 1)) return nullptr;
  const Isa* table[THAL_ISAS] = {nullptr, &kAvx2, &kAvx512, &kAvx512Bf16};
  return table[isa];
}
