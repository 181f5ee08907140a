// The kernels of tiled.cuh, tiled_PLACES_WEIGHTS_HIDDEN_ROWS: places of a tile, weights, hidden states, the dtype of the rows
// that `down` gives.

#include "experts/tiled.cuh"

#ifdef MOE_HOPPER
#define RUN_TILES(F, SIZE, ROW) moe::run_tiles<moe::F, moe::SIZE, ROW>(a)
#else
#define RUN_TILES(F, SIZE, ROW) __trap()
#endif

#define TILED(F, NAME, SIZE, PLACES, ROW, ROW_NAME)                                                       \
    extern "C" __global__ void __launch_bounds__(moe::kTiledThreads, 1)                                  \
        tiled_##PLACES##_##NAME##_##ROW_NAME(const __grid_constant__ moe::LayerArguments a) {             \
        RUN_TILES(F, SIZE, ROW);                                                                          \
    }
#define TILED_SIZES(F, NAME, ROW, ROW_NAME)               \
    TILED(F, NAME, FewPlaces, 96, ROW, ROW_NAME)          \
    TILED(F, NAME, ManyPlaces, 160, ROW, ROW_NAME)

TILED_SIZES(TiledMxFp4, mxfp4_bf16, float, f32)
TILED_SIZES(TiledMxFp4, mxfp4_bf16, __nv_bfloat16, bf16)
TILED_SIZES(TiledDense<__nv_bfloat16>, bf16_bf16, float, f32)
TILED_SIZES(TiledDense<__nv_bfloat16>, bf16_bf16, __nv_bfloat16, bf16)
TILED_SIZES(TiledDense<__half>, f16_f16, float, f32)
