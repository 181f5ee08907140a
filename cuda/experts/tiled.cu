// The kernels of tiled.cuh: weights and hidden states, and the dtype of the rows that `down` gives.

#include "experts/tiled.cuh"

#ifdef MOE_HOPPER
#define RUN_TILES(F, ROW) moe::run_tiles<moe::F, ROW>(a)
#else
#define RUN_TILES(F, ROW) __trap()
#endif

#define TILED(F, NAME, ROW, ROW_NAME)                                                                     \
    extern "C" __global__ void __launch_bounds__(moe::kTiledThreads, 1)                                   \
        tiled_##NAME##_##ROW_NAME(const __grid_constant__ moe::LayerArguments a) {                        \
        RUN_TILES(F, ROW);                                                                                \
    }

TILED(TiledMxFp4, mxfp4_bf16, float, f32)
TILED(TiledMxFp4, mxfp4_bf16, __nv_bfloat16, bf16)
TILED(TiledDense<__nv_bfloat16>, bf16_bf16, float, f32)
TILED(TiledDense<__nv_bfloat16>, bf16_bf16, __nv_bfloat16, bf16)
TILED(TiledDense<__half>, f16_f16, float, f32)
