// Tiles of bf16 attention on AMX. Whatever else the set is asked for is done as AVX512_BF16 does it, see find_isa.
#include "vec_avx512.hpp"
// The vector class comes first: the templates below are written against it.
#if defined(THAL_EMULATE_AMX)
#include "tiles_emulated.hpp"
#else
#include "tiles_amx.hpp"
#endif
#include "attention_overlap.hpp"
#include "gemm_tiles.hpp"

namespace {

struct VecAmx : Vec512 {
  static constexpr bool kTiles = true;
  static constexpr int kRows = 32;
  static constexpr int64_t kTileKeys = thal::kTileKeyBlock;
#if defined(THAL_EMULATE_AMX)
  using Tiles = EmulatedTiles;
#else
  using Tiles = AmxTiles;
#endif
};

}  // namespace

void thal::run_amx_bf16(const Plan& p, const Item& it, char* scratch) {
  VecAmx::Tiles::configure();
  run_tile<VecAmx, THAL_BF16, true>(p, it, scratch);
  VecAmx::Tiles::release();
}
