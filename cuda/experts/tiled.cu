// The kernels of tiled.cuh: weights of the first format, input (and output of gate_up) of the second.

#include "experts/tiled.cuh"

#ifdef MOE_HOPPER
#define PROJECT_TILES(F, KIND) moe::project_tiles<moe::F, moe::KIND>(a)
#else
#define PROJECT_TILES(F, KIND) __trap()
#endif

#define TILED(F, NAME)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(moe::kTiledThreads, 1)                                                    \
        tiled_gate_up_##NAME(const __grid_constant__ moe::ProjectionArguments a) {                                         \
        PROJECT_TILES(F, kGateUp);                                                                                         \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(moe::kTiledThreads, 1)                                                    \
        tiled_down_##NAME(const __grid_constant__ moe::ProjectionArguments a) {                                            \
        PROJECT_TILES(F, kDown);                                                                                           \
    }

TILED(TiledMxFp4, mxfp4_bf16)
TILED(TiledDense<__nv_bfloat16>, bf16_bf16)
TILED(TiledDense<__half>, f16_f16)
