// The kernels of experts/resident.cuh: resident_KIND_WEIGHTS_DTYPE_BLOCKSxBANDS, for tiles of 8 BLOCKS places and items of BANDS
// bands.

#include "experts/resident.cuh"

// Of one band several groups share a block, of two there is one group.
#define RESIDENT(FORMAT, FORMAT_NAME, T, NAME, KIND, KIND_NAME, BLOCKS, BANDS)                     \
    extern "C" __global__ void __launch_bounds__(BLOCKS * BANDS == 1 ? 1024 : 544)                 \
        resident_##KIND_NAME##_##FORMAT_NAME##_##NAME##_##BLOCKS##x##BANDS(                        \
            const __grid_constant__ moe::ProjectionArguments a) {                                  \
        moe::project_resident<moe::Made<moe::FORMAT, T, moe::KIND, BLOCKS, BANDS>>(a);             \
    }
#define RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, BLOCKS, BANDS)              \
    RESIDENT(FORMAT, FORMAT_NAME, T, NAME, kGateUp, gate_up, BLOCKS, BANDS)      \
    RESIDENT(FORMAT, FORMAT_NAME, T, NAME, kDown, down, BLOCKS, BANDS)
#define RESIDENT_SIZES(FORMAT, FORMAT_NAME, T, NAME)          \
    RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, 1, 1)        \
    RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, 2, 1)        \
    RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, 1, 2)        \
    RESIDENT_KINDS(FORMAT, FORMAT_NAME, T, NAME, 2, 2)

RESIDENT_SIZES(Narrow4, mxfp4, __nv_bfloat16, bf16)
RESIDENT_SIZES(Wide4, mxfp4_wide, __nv_bfloat16, bf16)
RESIDENT_SIZES(Wide4, mxfp4, __half, f16)
RESIDENT_SIZES(Plain, bf16, __nv_bfloat16, bf16)
RESIDENT_SIZES(Plain, f16, __half, f16)
