// The kernels of experts/resident.cuh, for tiles of 8 BLOCKS places:
//
//     resident_KIND_WEIGHTS_DTYPE_BLOCKS    one projection
//     resident_layer_WEIGHTS_DTYPE_BLOCKS   both

#include "experts/resident.cuh"

#define BOUNDS(BLOCKS) __launch_bounds__(BLOCKS == 1 ? 1024 : 544)
#define RESIDENT(FORMAT, FORMAT_NAME, T, NAME, KIND, KIND_NAME, BLOCKS)                                           \
    extern "C" __global__ void BOUNDS(BLOCKS) resident_##KIND_NAME##_##FORMAT_NAME##_##NAME##_##BLOCKS(           \
        const __grid_constant__ moe::ProjectionArguments a) {                                                     \
        moe::project_resident<moe::Made<moe::FORMAT, T, moe::KIND, BLOCKS>>(a);                                   \
    }
#define RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, BLOCKS)              \
    RESIDENT(FORMAT, FORMAT_NAME, T, NAME, kGateUp, gate_up, BLOCKS)      \
    RESIDENT(FORMAT, FORMAT_NAME, T, NAME, kDown, down, BLOCKS)
#define RESIDENT_SIZES(FORMAT, FORMAT_NAME, T, NAME)       \
    RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, 1)        \
    RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, 2)

RESIDENT_SIZES(Narrow4, mxfp4, __nv_bfloat16, bf16)
RESIDENT_SIZES(Wide4, mxfp4_wide, __nv_bfloat16, bf16)
RESIDENT_SIZES(Wide4, mxfp4, __half, f16)
RESIDENT_SIZES(Plain, bf16, __nv_bfloat16, bf16)
RESIDENT_SIZES(Plain, f16, __half, f16)

#define LAYER(FORMAT, FORMAT_NAME, T, NAME, BLOCKS)                                                               \
    extern "C" __global__ void BOUNDS(BLOCKS) resident_layer_##FORMAT_NAME##_##NAME##_##BLOCKS(                   \
        const __grid_constant__ moe::LayerArguments a) {                                                          \
        moe::run_layer<moe::FORMAT, T, BLOCKS>(a);                                                                \
    }
LAYER(Narrow4, mxfp4, __nv_bfloat16, bf16, 1)
LAYER(Plain, bf16, __nv_bfloat16, bf16, 1)
LAYER(Plain, f16, __half, f16, 1)
