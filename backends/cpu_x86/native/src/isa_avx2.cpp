// Kernels for AVX2, FMA and F16C.
#include "vec_avx2.hpp"
#include "vec_avx2_f64.hpp"
// The vector classes come first: the templates below are written against them.
#include "isa_table.hpp"

const thal::Isa thal::kAvx2 = {
    Vec256::N,
    thal::kKeyBlock,
    1,
    false,
    {run_tile<Vec256, THAL_F32, false>, run_tile<Vec256, THAL_BF16, false>, run_tile<Vec256, THAL_F16, false>,
     run_tile<Vec256d, THAL_F64, false>},
    {run_rows<Vec256, THAL_F32>, run_rows<Vec256, THAL_BF16>, run_rows<Vec256, THAL_F16>,
     nullptr,  // float64 has tiles alone
     run_rows<Vec256, THAL_I8>, run_rows<Vec256, THAL_F8>},
    fma_flops<Vec256>,
    run_program,
    {run_gradient<Vec256, THAL_F32, false>, run_gradient<Vec256, THAL_BF16, false>, run_gradient<Vec256, THAL_F16, false>,
     run_gradient<Vec256d, THAL_F64, false>},
    {store_key_gradients<Vec256, THAL_F32>, store_key_gradients<Vec256, THAL_BF16>, store_key_gradients<Vec256, THAL_F16>,
     store_key_gradients<Vec256d, THAL_F64>},
    run_map,
    reduce_map,
    {matmul_kernels<Vec256>(), matmul_kernels<Vec256d>(), {}},
    skinny_kernels<Vec256>(),
};
