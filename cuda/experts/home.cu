// The weighted sum that brings rows home:
//
//     sums[token] = round(sum over k of topk_weights[slot] * rows[slot_rank[slot]])      slot = token * top_k + k
//
// in slot order and float32, with one rounding. A thread has kWidth columns of a token: 4, which are 16 bytes of a row, where
// hidden_size allows.

#include "experts/projection.cuh"

namespace moe {

struct HomeArguments {
    const float* rows;          // [num_slots, hidden_size]
    const float* topk_weights;  // [num_tokens, top_k]
    const uint32_t* slot_rank;  // [num_slots]
    void* sums;                 // [num_tokens, hidden_size]
    uint64_t num_tokens;
    uint32_t top_k;
    uint32_t hidden_size;
};

template <int kWidth> struct RowPart;
template <> struct RowPart<1> { using Type = float; };
template <> struct RowPart<4> { using Type = float4; };

template <typename T, int kWidth>
__device__ __forceinline__ void bring_home(const HomeArguments& a) {
    allow_next_kernel();
    wait_for_previous_kernel();
    const uint32_t columns = a.hidden_size / kWidth;
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= a.num_tokens * columns) return;
    const uint64_t token = i / columns;
    const uint32_t column = static_cast<uint32_t>(i - token * columns);
    float sums[kWidth] = {};
#pragma unroll 4
    for (uint32_t k = 0; k < a.top_k; ++k) {
        const uint64_t slot = token * a.top_k + k;
        const uint32_t rank = a.slot_rank[slot];
        if (rank == kNothing) continue;
        const float weight = a.topk_weights[slot];
        const auto row = reinterpret_cast<const typename RowPart<kWidth>::Type*>(a.rows)[uint64_t(rank) * columns + column];
        const float* const values = reinterpret_cast<const float*>(&row);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sums[j] = __fadd_rn(sums[j], __fmul_rn(weight, values[j]));
    }
    T* const to = static_cast<T*>(a.sums) + i * kWidth;
    alignas(16) T out[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) keep(out + j, sums[j]);
    if constexpr (kWidth == 4 && sizeof(T) == 4) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out);
    } else if constexpr (kWidth == 4) {
        *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(out);
    } else {
        *to = out[0];
    }
}

}  // namespace moe

#define HOME(T, NAME, WIDTH)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) home_##NAME##_##WIDTH(const __grid_constant__ moe::HomeArguments a) { \
        moe::bring_home<T, WIDTH>(a);                                                                                     \
    }
HOME(float, f32, 1)
HOME(float, f32, 4)
HOME(__half, f16, 1)
HOME(__half, f16, 4)
HOME(__nv_bfloat16, bf16, 1)
HOME(__nv_bfloat16, bf16, 4)
