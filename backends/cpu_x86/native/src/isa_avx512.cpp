// Kernels for AVX-512 F, BW, VL and DQ; 16-bit inputs are widened to float32.
#include "vec_avx512.hpp"
#include "vec_avx512_f64.hpp"
// The vector classes come first: the templates below are written against them.
#include "isa_table.hpp"

const thal::Isa thal::kAvx512 = {
    Vec512::N,
    thal::kKeyBlock,
    1,
    false,
    {run_tile<Vec512, THAL_F32, false>, run_tile<Vec512, THAL_BF16, false>, run_tile<Vec512, THAL_F16, false>,
     run_tile<Vec512d, THAL_F64, false>},
    {run_rows<Vec512, THAL_F32>, run_rows<Vec512, THAL_BF16>, run_rows<Vec512, THAL_F16>,
     nullptr,  // float64 has tiles alone
     run_rows<Vec512, THAL_I8>, run_rows<Vec512, THAL_F8>},
    fma_flops<Vec512>,
    run_program,
    {run_gradient<Vec512, THAL_F32, false>, run_gradient<Vec512, THAL_BF16, false>, run_gradient<Vec512, THAL_F16, false>,
     run_gradient<Vec512d, THAL_F64, false>},
    {store_key_gradients<Vec512, THAL_F32>, store_key_gradients<Vec512, THAL_BF16>, store_key_gradients<Vec512, THAL_F16>,
     store_key_gradients<Vec512d, THAL_F64>},
    run_map,
    reduce_map,
    {matmul_kernels<Vec512>(), matmul_kernels<Vec512d>(), {}},
    skinny_kernels<Vec512>(),
};
