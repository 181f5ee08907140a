// Router logits to expert order in one launch (o.whole), or in two with `place` of order/order.cu behind it: the slots of a
// token, which go to different experts, are marked as soon as it is routed. routing/topk.cuh, routing/merge.cuh and
// order/order.cuh say how.
//
//     routed_row     one warp per token, for no more tokens than a block has warps
//     routed_merge, routed_threshold
//                    several tokens per warp, for any number of tokens

#include "order/order.cuh"
#include "routing/merge.cuh"
#include "routing/threshold.cuh"
#include "routing/topk.cuh"

namespace moe {

struct RoutedArguments {
    RoutingArguments routing;
    OrderArguments order;
};

// The tokens of a block's chunk.
struct Tokens {
    uint32_t first, end;

    __device__ __forceinline__ Tokens(const RoutingArguments& a, const OrderArguments& o)
        : first(blockIdx.x * o.chunk_units),
          end(static_cast<uint32_t>(min(uint64_t(first) + o.chunk_units, a.num_tokens))) {}
};

// Marks slot k of a token.
__device__ __forceinline__ void mark_slot(
    const OrderArguments& o, const Counters& c, const Tokens& tokens, uint32_t token, uint32_t k, uint32_t id) {
    const uint32_t unit = token - tokens.first;
    c.mark(unit, unit * o.top_k + k, local_expert(o, token * o.top_k + k, id));
}

// A warp has at most one token.
template <typename T, int N, int kScore, bool kNarrow>
__device__ __forceinline__ void mark_rows(const RoutingArguments& a, const OrderArguments& o, const Counters& c) {
    const Tokens tokens(a, o);
    const uint32_t lane = threadIdx.x % 32, token = tokens.first + threadIdx.x / 32;
    if (token >= tokens.end) return;
    uint32_t id = kNoExpert;
    if (token < valid_tokens(a)) {
        alignas(16) T logits[N];
        load_lane<T, N>(row_of<T>(a, token), a.stride_expert, a.num_experts, lane, logits);
        id = route_token<T, N, kScore, kNarrow>(a, token, logits, lane);
    } else {
        write_padding(a, token, lane);
    }
    if (lane < a.top_k) mark_slot(o, c, tokens, token, lane, id);
}

// kLanes lanes share a token; `route`, called by all lanes of a warp, writes the slots of a token below `end`, or those of
// padding if it is not valid, and returns the expert of lane `sub`'s slot: route(token, end, valid, sub).
template <int kLanes, typename Route>
__device__ __forceinline__ void mark_shared(
    const RoutingArguments& a, const OrderArguments& o, const Counters& c, Route route) {
    const Tokens tokens(a, o);
    const uint32_t sub = threadIdx.x % kLanes, step = blockDim.x / kLanes;
    const uint64_t valid = min(valid_tokens(a), uint64_t(tokens.end));
    const uint32_t passes = (tokens.end - tokens.first + step - 1) / step;
    for (uint32_t pass = 0; pass < passes; ++pass) {
        const uint64_t token = uint64_t(tokens.first) + pass * step + threadIdx.x / kLanes;
        const uint32_t id = route(token, tokens.end, token < valid, sub);
        if (token < tokens.end && sub < a.top_k) mark_slot(o, c, tokens, static_cast<uint32_t>(token), sub, id);
    }
}

}  // namespace moe

#define ROUTED_ROW(T, NAME, SCORE, SCORE_NAME, NARROW, N)                                             \
    extern "C" __global__ void __launch_bounds__(512)                                                 \
        routed_row_##NAME##_##SCORE_NAME##_##N(const __grid_constant__ moe::RoutedArguments a) {      \
        moe::allow_next_kernel();                                                                     \
        moe::order_chunk(a.order, [&](const moe::Counters& c) {                                       \
            moe::mark_rows<T, N, moe::SCORE, NARROW>(a.routing, a.order, c);                          \
        });                                                                                           \
    }
MOE_ROW_KERNELS(ROUTED_ROW)

#define ROUTED_SHARED(NAME, LANES, ROUTE)                                                                             \
    extern "C" __global__ void __launch_bounds__(512) NAME(const __grid_constant__ moe::RoutedArguments a) {         \
        moe::allow_next_kernel();                                                                                     \
        moe::order_chunk(a.order, [&](const moe::Counters& c) {                                                       \
            moe::mark_shared<LANES>(                                                                                  \
                a.routing, a.order, c, [&](uint64_t token, uint64_t end, bool valid, uint32_t sub) {                  \
                    return ROUTE(a.routing, token, end, valid, sub);                                                  \
                });                                                                                                   \
        });                                                                                                           \
    }
#define ROUTED_MERGE(T, NAME, LANES, CHUNKS, KEEP) \
    ROUTED_SHARED(routed_merge_##NAME##_##LANES##_##CHUNKS##_##KEEP, LANES, (moe::route_merged<T, LANES, CHUNKS, KEEP>))
#define ROUTED_THRESHOLD(T, NAME, SCORE, SCORE_NAME, LANES, CHUNKS)                 \
    ROUTED_SHARED(                                                                  \
        routed_threshold_##NAME##_##SCORE_NAME##_##LANES##_##CHUNKS, LANES,         \
        (moe::route_by_threshold<T, moe::SCORE, LANES, CHUNKS>))
MOE_MERGE_KERNELS(ROUTED_MERGE)
MOE_THRESHOLD_KERNELS_OF_FOUR(ROUTED_THRESHOLD)
