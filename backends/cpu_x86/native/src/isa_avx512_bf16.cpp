// Kernels for AVX-512 with VDPBF16PS: bf16 tiles multiply pairs, everything else is as in isa_avx512.cpp.
#include "vec_avx512.hpp"
#include "vec_avx512_f64.hpp"
// The vector classes come first: the templates below are written against them.
#include "isa_table.hpp"

const thal::Isa thal::kAvx512Bf16 = {
    Vec512::N,
    thal::kKeyBlock,
    1,
    true,
    {run_tile<Vec512, THAL_F32, false>, run_tile<Vec512, THAL_BF16, true>, run_tile<Vec512, THAL_F16, false>,
     run_tile<Vec512d, THAL_F64, false>},
    {run_rows<Vec512, THAL_F32>, run_rows<Vec512, THAL_BF16>, run_rows<Vec512, THAL_F16>,
     nullptr,  // float64 has tiles alone
     run_rows<Vec512, THAL_I8>, run_rows<Vec512, THAL_F8>},
    fma_flops<Vec512>,
    run_program,
    {run_gradient<Vec512, THAL_F32, false>, run_gradient<Vec512, THAL_BF16, true>, run_gradient<Vec512, THAL_F16, false>,
     run_gradient<Vec512d, THAL_F64, false>},
    {store_key_gradients<Vec512, THAL_F32>, store_key_gradients<Vec512, THAL_BF16>, store_key_gradients<Vec512, THAL_F16>,
     store_key_gradients<Vec512d, THAL_F64>},
    run_map,
    reduce_map,
    {matmul_kernels<Vec512>(), matmul_kernels<Vec512d>(), pair_kernels<Vec512>()},
    skinny_kernels<Vec512>(),
};
