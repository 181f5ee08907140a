// Router logits to expert order in one launch (o.whole), or in two with `place` of order/order.cu behind it: the warp that
// routes a token counts its slots, which go to different experts, at once. routing/topk.cuh and order/order.cuh say how.

#include "order/order.cuh"
#include "routing/topk.cuh"

namespace moe {

struct RoutedArguments {
    RoutingArguments routing;
    OrderArguments order;
};

template <typename T, int N, int kScore, bool kNarrow>
__device__ __forceinline__ void route_and_count(const RoutingArguments& a, const OrderArguments& o, uint16_t* counts) {
    const Span span = warp_span(o);
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t end = span.end / a.top_k, valid = min(valid_tokens(a), end);
    uint64_t token = span.first / a.top_k;
    alignas(16) T logits[N];
    load_token<T, N>(a, token, valid, lane, logits);
    for (; token < valid; ++token) {
        // The next token's logits are on their way while this one is routed.
        alignas(16) T next[N];
        load_token<T, N>(a, token + 1, valid, lane, next);
        const uint32_t id = route_token<T, N, kScore, kNarrow>(a, token, logits, lane);
        const uint32_t slot = static_cast<uint32_t>(token * a.top_k + lane);
        const uint32_t before = count_distinct(counts, lane < a.top_k ? local_expert(o, slot, id) : kNobody);
        if (lane < a.top_k) o.slot_rank[slot] = before;
#pragma unroll
        for (int i = 0; i < N; ++i) logits[i] = next[i];
    }
    for (; token < end; ++token) {
        write_padding(a, token, lane);
        if (lane < a.top_k) o.slot_rank[token * a.top_k + lane] = kNoSlot;
    }
}

}  // namespace moe

#define ROUTED(T, NAME, SCORE, SCORE_NAME, NARROW, N)                                                                     \
    extern "C" __global__ void __launch_bounds__(512)                                                                     \
        routed_##NAME##_##SCORE_NAME##_##N(const __grid_constant__ moe::RoutedArguments a) {                              \
        moe::allow_next_kernel();                                                                                         \
        moe::order_chunk(a.order, [&](uint16_t* counts) {                                                                 \
            moe::route_and_count<T, N, moe::SCORE, NARROW>(a.routing, a.order, counts);                                   \
        });                                                                                                               \
    }
MOE_ROW_KERNELS(ROUTED)
