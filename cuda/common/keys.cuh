// Order-preserving keys, dtype loads and warp reductions for kernels that choose the best of a row.
//
// A key is an unsigned number that orders like its value: NaN is 1, -0 and +0 are the same, everything else lies above 1.
// 0 stands for "taken" or "no such expert", so that neither can win while anything is left.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace moe {

constexpr uint32_t kTaken = 0;
constexpr uint32_t kNanKey = 1;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ uint32_t key_of(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 + 0 is +0
    const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    return value != value ? kNanKey : key;
}

__device__ __forceinline__ float value_of(uint32_t key) {
    const uint32_t bits = key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu);
    return key == kNanKey ? __uint_as_float(0x7fc00000u) : __uint_as_float(bits);
}

// The same scheme on the 16 bits of a narrow float.
template <typename T> struct Narrow;
template <> struct Narrow<__half> {
    static constexpr uint32_t kInfinity = 0x7c00;
    static __device__ __forceinline__ float value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
};
template <> struct Narrow<__nv_bfloat16> {
    static constexpr uint32_t kInfinity = 0x7f80;
    static __device__ __forceinline__ float value(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
};

template <typename T>
__device__ __forceinline__ uint32_t narrow_key_of(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    const uint32_t key = bits & 0x8000u ? 0x8000u - magnitude : 0x8000u + magnitude;  // both zeros are 0x8000
    return magnitude > Narrow<T>::kInfinity ? kNanKey : key;
}

template <typename T>
__device__ __forceinline__ float narrow_value_of(uint32_t key) {
    const uint32_t bits = key >= 0x8000u ? key - 0x8000u : 0x8000u | (0x8000u - key);
    return key == kNanKey ? __uint_as_float(0x7fc00000u) : Narrow<T>::value(static_cast<uint16_t>(bits));
}

}  // namespace moe
