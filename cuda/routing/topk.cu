// Top-k routing: router_logits [num_tokens, num_experts] to topk_ids and topk_weights [num_tokens, top_k].
//
// `row`: one warp per token, for few tokens; routing/topk.cuh says how, and why it is fast.
//
// `merge` and `threshold`: several tokens per warp, where there are many; routing/merge.cuh and routing/threshold.cuh say how.
//
// `any`: one block per token, keys in shared memory, for any number of experts that fits there, any top_k and any groups.
// It is made to be right and not to be fast.

#include "common/launch.cuh"
#include "routing/merge.cuh"
#include "routing/threshold.cuh"
#include "routing/topk.cuh"

namespace moe {

// One warp per token.
template <typename T, int N, int kScore, bool kNarrow>
__device__ __forceinline__ void route_row(const RoutingArguments& a) {
    const uint32_t lane = threadIdx.x & 31;
    const uint64_t token = uint64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (token >= a.num_tokens) return;
    if (token >= valid_tokens(a)) {
        write_padding(a, token, lane);
        return;
    }
    alignas(16) T logits[N];
    load_lane<T, N>(row_of<T>(a, token), a.stride_expert, a.num_experts, lane, logits);
    route_token<T, N, kScore, kNarrow>(a, token, logits, lane);
}

// kLanes lanes share a token; `route` is as in order/routed.cu.
template <int kLanes, typename Route>
__device__ __forceinline__ void route_shared(const RoutingArguments& a, Route route) {
    const uint64_t token = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
    route(token, a.num_tokens, token < valid_tokens(a), threadIdx.x % kLanes);
}

// ------------------------------------------------------------------------------------------------------------------
// One block per token

constexpr int kAnyThreads = 256;

// The largest key of all threads and the lowest place that holds it, in every thread.
__device__ __forceinline__ void block_best(uint32_t& key, uint32_t& place) {
    __shared__ uint32_t keys[kAnyThreads / 32], places[kAnyThreads / 32];
    const auto warp_best = [](uint32_t& key, uint32_t& place) {
        const uint32_t best = __reduce_max_sync(kAllLanes, key);
        place = __reduce_min_sync(kAllLanes, key == best ? place : 0xffffffffu);
        key = best;
    };
    warp_best(key, place);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        keys[threadIdx.x / 32] = key;
        places[threadIdx.x / 32] = place;
    }
    __syncthreads();
    const uint32_t i = threadIdx.x % (kAnyThreads / 32);
    key = keys[i];
    place = places[i];
    warp_best(key, place);
}

// The weights of `top_k` chosen logits, by one warp.
template <typename T>
__device__ void weigh_any(const RoutingArguments& a, const T* row, const float* chosen, uint32_t lane, float* weights) {
    const float best = chosen[0];
    float top = __uint_as_float(0x7fc00000u);
    for (uint32_t k = lane; k < a.top_k; k += 32) top = fmaxf(top, chosen[k]);
    top = warp_max_number(top);
    int method = a.weight;
    if (method == kSigmoidRenorm && !(best >= kSigmoidIsExp)) method = kRenormalize;
    const auto part = [&](float logit) {
        switch (method) {
            case kSigmoidAlone:
            case kSigmoidOverSum:
            case kSigmoidRenorm:
                return sigmoid_or_zero(logit);
            case kRootSoftplusOverSum:
                if (top != top || top < kSigmoidIsExp) return share(logit * 0.5f, top * 0.5f);
                if (top == kInf) return share(logit, top);
                return logit != logit ? 0.0f : root_softplus(logit);
            default:
                return share(logit, best);
        }
    };
    float sum = 0.0f;
    if (method == kDefault) {
        double all = 0.0;  // as the CPU: rows are long
        for (uint32_t e = lane; e < a.num_experts; e += 32) all += part(to_float(row[int64_t(e) * a.stride_expert]));
        sum = static_cast<float>(warp_sum(all));
    } else {
        for (uint32_t k = lane; k < a.top_k; k += 32) sum += part(chosen[k]);
        sum = warp_sum(sum);
    }
    if (method == kSigmoidAlone) sum = 1.0f;
    if (method == kSigmoidOverSum) sum = __fadd_rn(sum, kEpsilon);
    const bool scaled = method == kSigmoidOverSum || method == kRootSoftplusOverSum;
    for (uint32_t k = lane; k < a.top_k; k += 32) {
        const float weight = __fdiv_rn(part(chosen[k]), sum);
        weights[k] = scaled ? __fmul_rn(weight, a.factor) : weight;
    }
}

// Keeps the best groups: takes the keys of all others.
__device__ __forceinline__ void keep_groups_any(const RoutingArguments& a, uint32_t* keys, uint32_t* group_keys) {
    const uint32_t size = a.num_experts / a.num_groups;
    for (uint32_t g = threadIdx.x; g < a.num_groups; g += kAnyThreads) {
        uint32_t first = kTaken, second = kTaken;
        for (uint32_t i = 0; i < size; ++i) keep_two_best(keys[g * size + i], first, second);
        group_keys[g] = group_key_of(first, second);
    }
    __syncthreads();
    for (uint32_t g = threadIdx.x; g < a.num_groups; g += kAnyThreads) {
        uint32_t better = 0;
        for (uint32_t other = 0; other < a.num_groups; ++other) {
            better += group_keys[other] > group_keys[g] || (group_keys[other] == group_keys[g] && other < g);
        }
        if (better >= a.topk_group) {
            for (uint32_t i = 0; i < size; ++i) keys[g * size + i] = kTaken;
        }
    }
    __syncthreads();
}

template <typename T, int kScore>
__device__ __forceinline__ void route_any(const RoutingArguments& a) {
    MOE_DYNAMIC_SHARED(uint32_t, keys);                                   // [num_experts]
    uint32_t* group_keys = keys + a.num_experts;                          // [num_groups]
    uint32_t* ids = group_keys + a.num_groups;                            // [top_k]
    float* chosen = reinterpret_cast<float*>(ids + a.top_k);              // [top_k]
    const uint64_t valid = valid_tokens(a);
    for (uint64_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
        uint32_t* token_ids = a.topk_ids + token * a.top_k;
        float* token_weights = a.topk_weights + token * a.top_k;
        if (token >= valid) {
            for (uint32_t k = threadIdx.x; k < a.top_k; k += kAnyThreads) {
                token_ids[k] = kNoExpert;
                token_weights[k] = 0.0f;
            }
            continue;
        }
        const T* row = row_of<T>(a, token);
        for (uint32_t e = threadIdx.x; e < a.num_experts; e += kAnyThreads) {
            float score = score_of<kScore>(to_float(row[int64_t(e) * a.stride_expert]));
            if (kScore != kLogit && a.bias != nullptr) score = __fadd_rn(score, a.bias[e]);
            keys[e] = key_of(score);
        }
        __syncthreads();
        if (kScore != kLogit && a.topk_group < a.num_groups) keep_groups_any(a, keys, group_keys);
        for (uint32_t k = 0; k < a.top_k; ++k) {
            uint32_t best = kTaken, place = 0xffffffffu;
            for (uint32_t e = threadIdx.x; e < a.num_experts; e += kAnyThreads) {
                if (keys[e] > best) {  // a tie stays with the lower expert
                    best = keys[e];
                    place = e;
                }
            }
            block_best(best, place);
            if (threadIdx.x == place % kAnyThreads) {  // the thread that looks at it
                keys[place] = kTaken;
                ids[k] = place;
                chosen[k] = to_float(row[int64_t(place) * a.stride_expert]);
            }
        }
        __syncthreads();
        for (uint32_t k = threadIdx.x; k < a.top_k; k += kAnyThreads) token_ids[k] = ids[k];
        if (threadIdx.x < 32) weigh_any<T>(a, row, chosen, threadIdx.x, token_weights);
        __syncthreads();
    }
}

}  // namespace moe

#define ANY(T, NAME, SCORE, SCORE_NAME)                                                                           \
    extern "C" __global__ void __launch_bounds__(moe::kAnyThreads) any_##NAME##_##SCORE_NAME(const moe::RoutingArguments a) { \
        moe::route_any<T, moe::SCORE>(a);                                                                         \
    }
#define ANY_DTYPES(SCORE, SCORE_NAME) \
    ANY(float, f32, SCORE, SCORE_NAME) \
    ANY(__half, f16, SCORE, SCORE_NAME) \
    ANY(__nv_bfloat16, bf16, SCORE, SCORE_NAME)

ANY_DTYPES(kLogit, logit)
ANY_DTYPES(kSigmoid, sigmoid)
ANY_DTYPES(kRootSoftplus, root_softplus)

#define ROW(T, NAME, SCORE, SCORE_NAME, NARROW, N)                                                                       \
    extern "C" __global__ void __launch_bounds__(128) row_##NAME##_##SCORE_NAME##_##N(const moe::RoutingArguments a) { \
        moe::route_row<T, N, moe::SCORE, NARROW>(a);                                                                     \
    }
MOE_ROW_KERNELS(ROW)

#define SHARED(NAME, LANES, ROUTE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) NAME(const moe::RoutingArguments a) {                         \
        moe::route_shared<LANES>(a, [&](uint64_t token, uint64_t end, bool valid, uint32_t sub) {                   \
            ROUTE(a, token, end, valid, sub);                                                                       \
        });                                                                                                         \
    }
#define MERGE(T, NAME, LANES, CHUNKS, KEEP) \
    SHARED(merge_##NAME##_##LANES##_##CHUNKS##_##KEEP, LANES, (moe::route_merged<T, LANES, CHUNKS, KEEP>))
#define THRESHOLD(T, NAME, SCORE, SCORE_NAME, LANES, CHUNKS)        \
    SHARED(                                                         \
        threshold_##NAME##_##SCORE_NAME##_##LANES##_##CHUNKS, LANES, \
        (moe::route_by_threshold<T, moe::SCORE, LANES, CHUNKS>))
MOE_MERGE_KERNELS(MERGE)
MOE_THRESHOLD_KERNELS(THRESHOLD)
