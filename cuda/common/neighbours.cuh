// Numbers of a row as kernels move them: loaded as float, rounded once when they are kept, some neighbours at once.
#pragma once

#include "common/keys.cuh"

namespace moe {

__device__ __forceinline__ void keep(float* to, float value) { *to = value; }
__device__ __forceinline__ void keep(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void keep(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// Some neighbours in a row, loaded and stored at once.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Neighbours {
    T of[kWidth];
};

}  // namespace moe
