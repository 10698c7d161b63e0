// Which instruction sets this library was built with, the CPU has, and the operating system saves on a context switch.
#include <cstdint>
#include <initializer_list>

#include "plan.hpp"

#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(THAL_HAS_AMX_BF16) && !defined(THAL_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
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

#if !defined(THAL_HAS_AMX_BF16)
bool has_tiles() { return false; }
#elif defined(THAL_EMULATE_AMX)
bool has_tiles() { return true; }
#else
// AMX-BF16 and AMX-TILE; XCR0 bits 17 and 18: configuration and data of tiles are saved. Palette 1 as the kernels use it:
// eight tiles of 16 rows of 64 bytes. Linux lets a process use tiles once it has asked (kernel's Documentation/arch/x86/xstate.rst).
bool has_tiles() {
  constexpr uint64_t kState = uint64_t{3} << 17;
  if (!all(cpuid(7, 0).d, {22, 24}) || (saved_state() & kState) != kState) return false;
  const Registers palette = cpuid(0x1d, 1);
  if ((palette.b & 0xffff) != 64 || palette.b >> 16 < 8 || (palette.c & 0xffff) != 16) return false;
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}
#endif

// Bits of the sets whose kernels are in this library.
constexpr uint32_t kBuilt = 0
#if defined(THAL_HAS_AVX2)
                            | 1u << THAL_ISA_AVX2
#endif
#if defined(THAL_HAS_AVX512)
                            | 1u << THAL_ISA_AVX512
#endif
#if defined(THAL_HAS_AVX512_BF16)
                            | 1u << THAL_ISA_AVX512_BF16
#endif
#if defined(THAL_HAS_AMX_BF16)
                            | 1u << THAL_ISA_AMX_BF16
#endif
    ;

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
  if (!all(extended.a, {5})) return found;
  found |= 1u << THAL_ISA_AVX512_BF16;
  if (has_tiles()) found |= 1u << THAL_ISA_AMX_BF16;
  return found;
}

}  // namespace

extern "C" uint32_t thal_supported_isas(void) {
  static const uint32_t found = detect() & kBuilt;
  return found;
}

namespace {

#if defined(THAL_HAS_AMX_BF16)
// The bf16 tiles are AMX's, everything else is the next narrower set's.
const thal::Isa& amx_bf16() {
  static const thal::Isa set = [] {
    thal::Isa isa = thal::kAvx512Bf16;
    isa.key_block = thal::kTileKeyBlock;
    isa.score_blocks = 2;  // attention_overlap.hpp
    isa.run_tile[THAL_BF16] = thal::run_amx_bf16;
    return isa;
  }();
  return set;
}
#endif

}  // namespace

const thal::Isa* thal::find_isa(int32_t isa) {
  if (isa <= THAL_ISA_AUTO || isa >= THAL_ISAS || !(thal_supported_isas() >> isa & 1)) return nullptr;
  switch (isa) {
#if defined(THAL_HAS_AVX2)
    case THAL_ISA_AVX2:
      return &kAvx2;
#endif
#if defined(THAL_HAS_AVX512)
    case THAL_ISA_AVX512:
      return &kAvx512;
#endif
#if defined(THAL_HAS_AVX512_BF16)
    case THAL_ISA_AVX512_BF16:
      return &kAvx512Bf16;
#endif
#if defined(THAL_HAS_AMX_BF16)
    case THAL_ISA_AMX_BF16:
      return &amx_bf16();
#endif
    default:
      return nullptr;
  }
}
