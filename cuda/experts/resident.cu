// The kernels of experts/resident.cuh, for tiles of 8 BLOCKS places: resident_WEIGHTS_DTYPE_BLOCKS.

#include "experts/resident.cuh"

#define RESIDENT(FORMAT, FORMAT_NAME, T, NAME, BLOCKS)                                                                \
    extern "C" __global__ void __launch_bounds__(32 * (moe::kMaxWarps + 1)) resident_##FORMAT_NAME##_##NAME##_##BLOCKS( \
        const __grid_constant__ moe::LayerArguments a) {                                                              \
        moe::run_layer<moe::Made<moe::FORMAT, T, BLOCKS>>(a);                                                         \
    }
#define RESIDENT_SIZES(FORMAT, FORMAT_NAME, T, NAME)    \
    RESIDENT(FORMAT, FORMAT_NAME, T, NAME, 1)           \
    RESIDENT(FORMAT, FORMAT_NAME, T, NAME, 2)

RESIDENT_SIZES(Narrow4, mxfp4, __nv_bfloat16, bf16)
RESIDENT_SIZES(Wide4, mxfp4_wide, __nv_bfloat16, bf16)
RESIDENT_SIZES(Wide4, mxfp4, __half, f16)
RESIDENT_SIZES(Plain, bf16, __nv_bfloat16, bf16)
RESIDENT_SIZES(Plain, f16, __half, f16)
