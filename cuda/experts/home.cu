// The weighted sum that brings rows home:
//
//     sums[token] = round(sum over k of topk_weights[slot] * rows[slot_rank[slot]])      slot = token * top_k + k
//
// in slot order and float32, with one rounding. A thread has kWidth columns of a token: as many as are 16 bytes of a row, where
// hidden_size allows.

#include "experts/projection.cuh"

namespace moe {

struct HomeArguments {
    const void* rows;           // [num_slots, hidden_size]
    const float* topk_weights;  // [num_tokens, top_k]
    const uint32_t* slot_rank;  // [num_slots]
    void* sums;                 // [num_tokens, hidden_size]
    uint64_t num_tokens;
    uint32_t top_k;
    uint32_t hidden_size;
};

// Slots of a token that are looked up ahead.
constexpr uint32_t kAhead = 4;

template <typename Row, typename T, int kWidth>
__device__ __forceinline__ void bring_home(const HomeArguments& a) {
    allow_next_kernel();
    const uint32_t columns = a.hidden_size / kWidth;
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, end = a.num_tokens * columns;
    if (i >= end) return;
    // 64-bit divisions would take longer than the rest.
    const uint64_t token = end >> 32 == 0 ? uint32_t(i) / columns : i / columns;
    const uint32_t column = static_cast<uint32_t>(i - token * columns);
    // The first ranks and weights while the kernel before this one works: those that rows come from let this one begin only when
    // what came before them has been written.
    uint32_t ranks[kAhead];
    float weights[kAhead];
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k) {
        if (k < a.top_k) ranks[k] = a.slot_rank[token * a.top_k + k], weights[k] = a.topk_weights[token * a.top_k + k];
    }
    wait_for_previous_kernel();
    float sums[kWidth] = {};
    const auto add = [&](uint32_t rank, float weight) {
        if (rank == kNothing) return;
        const auto row = static_cast<const Neighbours<Row, kWidth>*>(a.rows)[uint64_t(rank) * columns + column];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sums[j] = __fadd_rn(sums[j], __fmul_rn(weight, to_float(row.of[j])));
    };
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k) {
        if (k < a.top_k) add(ranks[k], weights[k]);
    }
#pragma unroll 4
    for (uint32_t k = kAhead; k < a.top_k; ++k) add(a.slot_rank[token * a.top_k + k], a.topk_weights[token * a.top_k + k]);
    Neighbours<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) keep(out.of + j, sums[j]);
    static_cast<Neighbours<T, kWidth>*>(a.sums)[i] = out;
}

}  // namespace moe

#define HOME(ROW, ROW_NAME, T, NAME, WIDTH)                                                  \
    extern "C" __global__ void __launch_bounds__(256) home_##ROW_NAME##_##NAME##_##WIDTH(    \
        const __grid_constant__ moe::HomeArguments a) {                                      \
        moe::bring_home<ROW, T, WIDTH>(a);                                                   \
    }
HOME(float, f32, float, f32, 1)
HOME(float, f32, float, f32, 4)
HOME(float, f32, __half, f16, 1)
HOME(float, f32, __half, f16, 4)
HOME(float, f32, __nv_bfloat16, bf16, 1)
HOME(float, f32, __nv_bfloat16, bf16, 4)
HOME(__nv_bfloat16, bf16, __nv_bfloat16, bf16, 8)
