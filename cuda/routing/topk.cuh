// Top-k routing of one token by one warp: for up to 1024 experts and top_k up to 32.
//
//     key[e] = order-preserving key of what the method chooses by      0 where e is taken, or no expert
//     top_k times: the largest key wins, a tie goes to the lower expert; its key becomes 0
//     weights = what the method makes of the chosen logits             src/routing/method.rs has the table
//
// Lane l owns the experts l * N .. l * N + N, in registers, so lower lanes own lower experts. Why it is fast:
//
// 1. Logits are read once, 16 bytes at a time where they lie so, and nothing goes through shared memory.
// 2. The maximum over the warp is one instruction, redux.sync. For 16-bit logits that are compared themselves, key and
//    expert share 32 bits (key << 16 | ~expert), so that one reduction finds the winner, tie included, and the winner's
//    logit is read off its key.
// 3. A lane keeps up to 8 such keys sorted, so that a winner leaves by shifting the lane's list. Otherwise the top_k-th best of
//    the lanes' bests bounds the row's top_k-th best from below: the few keys that reach it are brought together, one in
//    each lane, and each counts those before it.
// 4. Lane k keeps the k-th winner: exponentials, sum and stores are done once, by all lanes side by side.
//
// Padding: tokens from *num_valid on get ids of ~0 and weights of 0, and their logits are not read.
#pragma once

#include "common/keys.cuh"
#include "routing/scores.cuh"

namespace moe {

// What a method is made of; the numbers are those of src/routing/cuda.rs.
enum Score : int { kLogit = 0, kSigmoid = 1, kRootSoftplus = 2 };
enum Weight : int {
    kDefault = 0,
    kRenormalize = 1,
    kSigmoidOverSum = 2,  // DeepSeekV3, MiniMax2
    kSigmoidAlone = 3,    // Llama4
    kSigmoidRenorm = 4,
    kRootSoftplusOverSum = 5,  // DeepSeekV4
};

struct RoutingArguments {
    const void* logits;
    int64_t stride_token;
    int64_t stride_expert;
    uint64_t num_tokens;
    uint32_t num_experts;
    uint32_t top_k;
    const float* bias;          // [num_experts], 16-byte aligned, or null
    const uint32_t* num_valid;  // one number, or null
    uint32_t* topk_ids;
    float* topk_weights;
    int32_t score;
    int32_t weight;
    float factor;
    uint32_t num_groups;
    uint32_t topk_group;
    uint32_t group_bits;  // experts of a group, if they are a power of two: their logarithm
    uint32_t many;  // 1: more tokens than the device has warps, so that instructions count and not their delay
};

constexpr uint32_t kNoExpert = 0xffffffffu;
// Warps of a block that gives a warp to each token, at most.
constexpr int kMostWarps = 16;

__device__ __forceinline__ uint64_t valid_tokens(const RoutingArguments& a) {
    if (a.num_valid == nullptr) return a.num_tokens;
    const uint64_t valid = *a.num_valid;
    return valid < a.num_tokens ? valid : a.num_tokens;
}

template <typename T>
__device__ __forceinline__ const T* row_of(const RoutingArguments& a, uint64_t token) {
    return static_cast<const T*>(a.logits) + int64_t(token) * a.stride_token;
}

template <int kScore>
__device__ __forceinline__ float score_of(float logit) {
    return kScore == kSigmoid ? sigmoid(logit) : kScore == kRootSoftplus ? root_softplus(logit) : logit;
}

// The sum over each `width` lanes (a power of two), and the bits of lane_sum() of the CPU if all other values are 0.
template <typename T>
__device__ __forceinline__ T warp_sum(T v, uint32_t width = 32) {
#pragma unroll
    for (uint32_t d = 16; d > 0; d /= 2) {
        if (d < width) v += __shfl_xor_sync(kAllLanes, v, d);
    }
    return v;
}

// The largest of each `width` lanes; NaN does not count.
__device__ __forceinline__ float warp_max_number(float v, uint32_t width = 32) {
#pragma unroll
    for (uint32_t d = 16; d > 0; d /= 2) {
        if (d < width) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, d));
    }
    return v;
}

// The weight of the logit in this lane; each `width` lanes (a power of two) weigh the slots of one token. `in` says whether
// the lane holds a slot; `best` is the largest chosen logit by the order of the choice (the first lane's); `denominator`
// belongs to Default alone.
__device__ __forceinline__ float weigh(
    int method, float factor, float logit, bool in, float denominator, uint32_t width) {
    const float best = __shfl_sync(kAllLanes, logit, 0, width);
    float s;
    switch (method) {
        case kDefault:
            return __fdiv_rn(share(logit, best), denominator);
        case kSigmoidAlone:
            return sigmoid_or_zero(logit);
        case kSigmoidOverSum:
            s = sigmoid_or_zero(logit);
            break;
        case kSigmoidRenorm:  // of small logits the quotient is a softmax
            s = best >= kSigmoidIsExp ? sigmoid_or_zero(logit) : share(logit, best);
            break;
        case kRootSoftplusOverSum: {
            // Chosen by score + bias, so the largest logit may be anywhere.
            const float top = warp_max_number(in ? logit : __uint_as_float(0x7fc00000u), width);
            if (top != top || top < kSigmoidIsExp) {
                s = share(logit * 0.5f, top * 0.5f);
            } else if (top == kInf) {
                s = share(logit, top);
            } else {
                s = logit != logit ? 0.0f : root_softplus(logit);
            }
            break;
        }
        default:
            s = share(logit, best);
    }
    s = in ? s : 0.0f;
    float sum = warp_sum(s, width);
    if (method == kSigmoidOverSum) sum = __fadd_rn(sum, kEpsilon);
    const float weight = __fdiv_rn(s, sum);
    return method == kSigmoidOverSum || method == kRootSoftplusOverSum ? __fmul_rn(weight, factor) : weight;
}

// ------------------------------------------------------------------------------------------------------------------
// One warp per token

__device__ __forceinline__ float load_one(const float* at) { return __ldg(at); }
template <typename T>
__device__ __forceinline__ uint32_t load_one(const T* at) { return __ldg(reinterpret_cast<const uint16_t*>(at)); }

__device__ __forceinline__ void keep_one(float* to, float value) { *to = value; }
template <typename T>
__device__ __forceinline__ void keep_one(T* to, uint32_t bits) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
}

// Words of type W into `out`, which they fill.
template <typename W, typename T, int N>
__device__ __forceinline__ void load_words(const T* first, T (&out)[N]) {
    constexpr int kPer = sizeof(W) / sizeof(T);
#pragma unroll
    for (int i = 0; i < N; i += kPer) *reinterpret_cast<W*>(&out[i]) = __ldg(reinterpret_cast<const W*>(first + i));
}

// Whether `N` elements of type T are whole words of type W, at an address of such words.
template <typename W, typename T, int N>
__device__ __forceinline__ bool has_words(const T* first) {
    return N * sizeof(T) % sizeof(W) == 0 && reinterpret_cast<uintptr_t>(first) % sizeof(W) == 0;
}

template <typename T, int N>
__device__ __forceinline__ void load_lane(const T* row, int64_t stride, uint32_t num_experts, uint32_t lane, T (&out)[N]) {
    constexpr int kBytes = N * sizeof(T);
    const T* first = row + int64_t(lane) * N * stride;
    const uint32_t count = min(num_experts - min(num_experts, lane * N), uint32_t(N));
    const bool together = count == N && stride == 1;
    if (kBytes >= 16 && together && has_words<uint4, T, N>(first)) {
        if constexpr (kBytes >= 16) load_words<uint4>(first, out);
    } else if (kBytes == 8 && together && has_words<uint2, T, N>(first)) {
        if constexpr (kBytes == 8) load_words<uint2>(first, out);
    } else if (kBytes >= 4 && together && has_words<uint32_t, T, N>(first)) {
        if constexpr (kBytes >= 4) load_words<uint32_t>(first, out);
    } else {
        // All loads before the first use: 16-bit elements share registers once they are kept.
        decltype(load_one(first)) loaded[N];
#pragma unroll
        for (int i = 0; i < N; ++i) loaded[i] = i < count ? load_one(first + i * stride) : 0;
#pragma unroll
        for (int i = 0; i < N; ++i) keep_one(&out[i], loaded[i]);
    }
}

__device__ __forceinline__ void order_pair(uint32_t& a, uint32_t& b) {
    const uint32_t high = max(a, b), low = min(a, b);
    a = high;
    b = low;
}

// Sorts up to 8 keys, descending.
template <int N>
__device__ __forceinline__ void sort_keys(uint32_t (&k)[N]) {
    if constexpr (N == 2) {
        order_pair(k[0], k[1]);
    } else if constexpr (N == 4) {
        order_pair(k[0], k[2]); order_pair(k[1], k[3]);
        order_pair(k[0], k[1]); order_pair(k[2], k[3]);
        order_pair(k[1], k[2]);
    } else if constexpr (N == 8) {
        order_pair(k[0], k[2]); order_pair(k[1], k[3]); order_pair(k[4], k[6]); order_pair(k[5], k[7]);
        order_pair(k[0], k[4]); order_pair(k[1], k[5]); order_pair(k[2], k[6]); order_pair(k[3], k[7]);
        order_pair(k[0], k[1]); order_pair(k[2], k[3]); order_pair(k[4], k[5]); order_pair(k[6], k[7]);
        order_pair(k[2], k[4]); order_pair(k[3], k[5]);
        order_pair(k[1], k[4]); order_pair(k[3], k[6]);
        order_pair(k[1], k[2]); order_pair(k[3], k[4]); order_pair(k[5], k[6]);
    }
}

// The key and the expert of the lane's slot, if no more keys than lanes reach the bound; false and nothing otherwise. Lanes
// from top_k on are told nothing.
template <int N>
__device__ __forceinline__ bool choose_by_bound(
    const uint32_t (&keys)[N], uint32_t lane, uint32_t top_k, uint32_t& key, uint32_t& expert) {
    __shared__ uint2 rooms[kMostWarps][32];
    uint2* const room = rooms[threadIdx.x / 32];
    uint32_t head = keys[0];
#pragma unroll
    for (int i = 1; i < N; ++i) head = max(head, keys[i]);
    uint32_t bound = 0;
    for (uint32_t k = 0; k < top_k; ++k) {
        bound = __reduce_max_sync(kAllLanes, head);
        head = head == bound ? kTaken : head;  // of all lanes that have it, which makes the bound lower and not wrong
    }
    bound = max(bound, 1u);
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) count += keys[i] >= bound;
    const uint32_t total = __reduce_add_sync(kAllLanes, count);
    if (total > 32 || total < top_k) return false;
    uint32_t place = count;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t lower = __shfl_up_sync(kAllLanes, place, d);
        if (lane >= d) place += lower;
    }
    place -= count;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (keys[i] >= bound) room[place++] = make_uint2(keys[i], lane * N + i);
    }
    __syncwarp();
    // In the order of experts: a tie goes to the lower place.
    const uint2 mine = room[min(lane, total - 1)];
    uint32_t better = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < total; ++i) {
        const uint32_t other = room[i].x;
        better += other > mine.x || (other == mine.x && i < lane);
    }
    __syncwarp();
    if (lane < total) room[better] = mine;
    __syncwarp();
    key = room[lane].x;
    expert = room[lane].y;
    __syncwarp();
    return true;
}

struct Chosen {
    uint32_t id;   // of this lane's slot
    float logit;   // of this lane's slot
    float denominator;
};

// 16-bit logits that are compared themselves: key << 16 | ~expert.
template <typename T, int N>
__device__ __forceinline__ Chosen choose_narrow(const RoutingArguments& a, const T (&logits)[N], uint32_t lane) {
    uint32_t keys[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const uint32_t expert = lane * N + i;
        const uint32_t bits = *reinterpret_cast<const uint16_t*>(&logits[i]);
        // A mask and no condition, which would become a branch.
        const uint32_t mask = 0u - static_cast<uint32_t>(expert < a.num_experts);
        keys[i] = (narrow_key_of<T>(bits) << 16 | (0xffffu - expert)) & mask;
    }
    constexpr bool kSorted = N <= 8;
    if constexpr (kSorted) sort_keys<N>(keys);
    uint32_t head = keys[0];
    if constexpr (!kSorted) {
#pragma unroll
        for (int i = 1; i < N; ++i) head = max(head, keys[i]);
    }
    Chosen chosen{0, 0.0f, 1.0f};
    if (a.weight == kDefault) {
        const float best = narrow_value_of<T>(__reduce_max_sync(kAllLanes, head) >> 16);
        double sum = 0.0;  // as the CPU: rows are long
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (lane * N + i < a.num_experts) sum += share(to_float(logits[i]), best);
        }
        chosen.denominator = static_cast<float>(warp_sum(sum));
    }
    uint32_t mine = 0, unused;
    const bool chosen_by_bound = !kSorted && a.many && choose_by_bound<N>(keys, lane, a.top_k, mine, unused);
#pragma unroll 1
    for (uint32_t k = 0; k < a.top_k && !chosen_by_bound; ++k) {
        const uint32_t winner = __reduce_max_sync(kAllLanes, head);
        if (lane == k) mine = winner;
        if constexpr (kSorted) {
            if (head == winner) {
#pragma unroll
                for (int i = 0; i + 1 < N; ++i) keys[i] = keys[i + 1];
                keys[N - 1] = kTaken;
            }
            head = keys[0];
        } else if (head == winner) {
            head = kTaken;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                keys[i] = keys[i] == winner ? kTaken : keys[i];
                head = max(head, keys[i]);
            }
        }
    }
    chosen.id = 0xffffu - (mine & 0xffffu);
    chosen.logit = narrow_value_of<T>(mine >> 16);
    return chosen;
}

// The score of a group from the keys of its two best; NaN and missing experts do not count beside a number.
__device__ __forceinline__ uint32_t group_key_of(uint32_t first, uint32_t second) {
    return key_of(second <= kNanKey ? value_of(first) : __fadd_rn(value_of(first), value_of(second)));
}

__device__ __forceinline__ void keep_two_best(uint32_t key, uint32_t& first, uint32_t& second) {
    second = max(second, min(first, key));
    first = max(first, key);
}

// Groups that are a whole number of lanes, a power of two of them: takes the keys of groups that are not kept.
template <int N>
__device__ __forceinline__ void keep_groups_of_lanes(const RoutingArguments& a, uint32_t (&keys)[N], uint32_t lane) {
    const uint32_t lanes = a.num_experts / a.num_groups / N;
    // The two best of the lane, then of the group.
    uint32_t first = kTaken, second = kTaken;
#pragma unroll
    for (int i = 0; i < N; ++i) keep_two_best(keys[i], first, second);
    for (uint32_t d = 1; d < lanes; d *= 2) {
        const uint32_t other_first = __shfl_xor_sync(kAllLanes, first, d);
        const uint32_t other_second = __shfl_xor_sync(kAllLanes, second, d);
        second = max(min(first, other_first), max(second, other_second));
        first = max(first, other_first);
    }
    const uint32_t group_key = group_key_of(first, second);
    const uint32_t group = lane / lanes;
    uint32_t better = 0;
#pragma unroll 4
    for (uint32_t g = 0; g < a.num_groups; ++g) {
        const uint32_t other = __shfl_sync(kAllLanes, group_key, (g * lanes) & 31);
        better += (other > group_key) || (other == group_key && g < group);
    }
    if (better >= a.topk_group) {
#pragma unroll
        for (int i = 0; i < N; ++i) keys[i] = kTaken;
    }
}

// Any groups, up to 32 of them: the warp looks at one after the other, and lane g keeps the score of group g.
template <int N>
__device__ __forceinline__ void keep_any_groups(const RoutingArguments& a, uint32_t (&keys)[N], uint32_t lane) {
    const uint32_t size = a.num_experts / a.num_groups;
    uint32_t group_key = kTaken;
    for (uint32_t g = 0; g < a.num_groups; ++g) {
        uint32_t first = kTaken, second = kTaken;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            // Wraps far beyond `size` before the group.
            if (lane * N + i - g * size < size) keep_two_best(keys[i], first, second);
        }
        const uint32_t best = __reduce_max_sync(kAllLanes, first);
        const uint32_t owner = __ffs(__ballot_sync(kAllLanes, first == best)) - 1;
        const uint32_t next = __reduce_max_sync(kAllLanes, lane == owner ? second : first);
        if (lane == g) group_key = group_key_of(best, next);
    }
    uint32_t better = 0;
    for (uint32_t g = 0; g < a.num_groups; ++g) {
        const uint32_t other = __shfl_sync(kAllLanes, group_key, g);
        better += (other > group_key) || (other == group_key && g < lane);
    }
    const uint32_t kept = __ballot_sync(kAllLanes, lane < a.num_groups && better < a.topk_group);
    uint32_t group = lane * N / size, place = lane * N % size;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (group >= a.num_groups || !(kept >> group & 1)) keys[i] = kTaken;
        if (++place == size) {
            place = 0;
            ++group;
        }
    }
}

template <int N>
__device__ __forceinline__ void keep_groups(const RoutingArguments& a, uint32_t (&keys)[N], uint32_t lane) {
    const uint32_t size = a.num_experts / a.num_groups, lanes = size / N;
    if (a.num_experts == 32 * N && size % N == 0 && (lanes & (lanes - 1)) == 0) {
        keep_groups_of_lanes<N>(a, keys, lane);
    } else {
        keep_any_groups<N>(a, keys, lane);
    }
}

// The selection bias of the experts of a lane; 0 where there is none, which changes no key.
template <int N>
__device__ __forceinline__ void load_bias(const RoutingArguments& a, uint32_t lane, float (&bias)[N]) {
    const bool has = a.bias != nullptr;
    if (N >= 4 && has && lane * N + N <= a.num_experts) {
        if constexpr (N >= 4) load_words<float4>(a.bias + lane * N, bias);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) bias[i] = has && lane * N + i < a.num_experts ? __ldg(a.bias + lane * N + i) : 0.0f;
}

// Any other choice: 32-bit keys.
template <typename T, int N, int kScore>
__device__ __forceinline__ Chosen choose_wide(const RoutingArguments& a, const T* row, const T (&logits)[N], uint32_t lane) {
    alignas(16) float bias[N];
    if (kScore != kLogit) load_bias<N>(a, lane, bias);
    uint32_t keys[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        // Of experts that do not exist too: without a branch, all experts of the lane go side by side.
        float score = score_of<kScore>(to_float(logits[i]));
        if (kScore != kLogit) score = __fadd_rn(score, bias[i]);
        keys[i] = lane * N + i < a.num_experts ? key_of(score) : kTaken;
    }
    if (kScore != kLogit && a.topk_group < a.num_groups) keep_groups<N>(a, keys, lane);
    // As a tree, which is less deep than a chain.
    const auto best_key = [&] {
        uint32_t best[N];
#pragma unroll
        for (int i = 0; i < N; ++i) best[i] = keys[i];
#pragma unroll
        for (int d = N / 2; d > 0; d /= 2) {
#pragma unroll
            for (int i = 0; i < d; ++i) best[i] = max(best[i], best[i + d]);
        }
        return best[0];
    };
    uint32_t head = best_key();
    Chosen chosen{0, 0.0f, 1.0f};
    if (a.weight == kDefault) {
        const float best = value_of(__reduce_max_sync(kAllLanes, head));
        double sum = 0.0;  // as the CPU: rows are long
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (lane * N + i < a.num_experts) sum += share(to_float(logits[i]), best);
        }
        chosen.denominator = static_cast<float>(warp_sum(sum));
    }
    uint32_t key = 0;
    const bool chosen_by_bound = N > 1 && a.many && choose_by_bound<N>(keys, lane, a.top_k, key, chosen.id);
    if (chosen_by_bound) chosen.logit = value_of(key);
#pragma unroll 1
    for (uint32_t k = 0; k < a.top_k && !chosen_by_bound; ++k) {
        const uint32_t winner = __reduce_max_sync(kAllLanes, head);
        const uint32_t owner = __ffs(__ballot_sync(kAllLanes, head == winner)) - 1;  // lower lanes own lower experts
        // The lane's first expert with this key, a tie going to the lower one.
        uint32_t place = 0;
#pragma unroll
        for (int i = N - 1; i > 0; --i) place = keys[i] == winner ? i : place;
        if (N > 1 && keys[0] == winner) place = 0;
        const uint32_t id = __shfl_sync(kAllLanes, lane * N + place, owner);
        if (lane == k) {
            chosen.id = id;
            chosen.logit = value_of(winner);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) keys[i] = lane == owner && i == place ? kTaken : keys[i];
        head = best_key();
    }
    if (kScore != kLogit && lane < a.top_k) chosen.logit = to_float(row[int64_t(chosen.id) * a.stride_expert]);
    return chosen;
}

// Routes one token whose logits were loaded: writes ids and weights, and returns the expert of this lane's slot.
template <typename T, int N, int kScore, bool kNarrow>
__device__ __forceinline__ uint32_t route_token(
    const RoutingArguments& a, uint64_t token, const T (&logits)[N], uint32_t lane) {
    Chosen chosen;
    if constexpr (kNarrow) {
        chosen = choose_narrow<T, N>(a, logits, lane);
    } else {
        chosen = choose_wide<T, N, kScore>(a, row_of<T>(a, token), logits, lane);
    }
    const bool in = lane < a.top_k;
    // Adding zeros changes nothing, so that fewer lanes give the same sum.
    const uint32_t width = a.top_k <= 4 ? 4 : a.top_k <= 8 ? 8 : 32;
    const float weight = weigh(a.weight, a.factor, chosen.logit, in, chosen.denominator, width);
    if (in) {
        a.topk_ids[token * a.top_k + lane] = chosen.id;
        a.topk_weights[token * a.top_k + lane] = weight;
    }
    return in ? chosen.id : kNoExpert;
}

__device__ __forceinline__ void write_padding(const RoutingArguments& a, uint64_t token, uint32_t lane) {
    if (lane < a.top_k) {
        a.topk_ids[token * a.top_k + lane] = kNoExpert;
        a.topk_weights[token * a.top_k + lane] = 0.0f;
    }
}

}  // namespace moe

// A kernel for each dtype of the logits, score and number of experts that a lane owns:
// KERNEL(type, its name, score, its name, whether 16-bit logits are compared themselves, experts of a lane).
#define MOE_ROW_KERNELS_OF(KERNEL, T, NAME, SCORE, SCORE_NAME, NARROW) \
    KERNEL(T, NAME, SCORE, SCORE_NAME, NARROW, 1)                      \
    KERNEL(T, NAME, SCORE, SCORE_NAME, NARROW, 2)                      \
    KERNEL(T, NAME, SCORE, SCORE_NAME, NARROW, 4)                      \
    KERNEL(T, NAME, SCORE, SCORE_NAME, NARROW, 8)                      \
    KERNEL(T, NAME, SCORE, SCORE_NAME, NARROW, 16)                     \
    KERNEL(T, NAME, SCORE, SCORE_NAME, NARROW, 32)

#define MOE_ROW_KERNELS(KERNEL)                                                             \
    MOE_ROW_KERNELS_OF(KERNEL, float, f32, kLogit, logit, false)                            \
    MOE_ROW_KERNELS_OF(KERNEL, __half, f16, kLogit, logit, true)                            \
    MOE_ROW_KERNELS_OF(KERNEL, __nv_bfloat16, bf16, kLogit, logit, true)                    \
    MOE_ROW_KERNELS_OF(KERNEL, float, f32, kSigmoid, sigmoid, false)                        \
    MOE_ROW_KERNELS_OF(KERNEL, __half, f16, kSigmoid, sigmoid, false)                       \
    MOE_ROW_KERNELS_OF(KERNEL, __nv_bfloat16, bf16, kSigmoid, sigmoid, false)               \
    MOE_ROW_KERNELS_OF(KERNEL, float, f32, kRootSoftplus, root_softplus, false)             \
    MOE_ROW_KERNELS_OF(KERNEL, __half, f16, kRootSoftplus, root_softplus, false)            \
    MOE_ROW_KERNELS_OF(KERNEL, __nv_bfloat16, bf16, kRootSoftplus, root_softplus, false)
