// Top-k routing of several tokens by one warp, for what needs 32-bit keys: float32 logits, and scores with their bias and
// groups; top_k up to 8.
//
//     kLanes lanes share a token; each owns 8 * kChunks experts and sorts their keys, without the experts
//     bound     the top_k-th best key of the row: lists of best keys are merged as in routing/merge.cuh
//     collect   the experts whose keys reach the bound, of equal ones the lowest
//     slots     in the order of keys and experts, a lane for each
//
// Why it is fast: keys alone are sorted by minima and maxima, without a branch, and to find them again takes one comparison
// for each; a key together with its expert would take five instructions for each minimum and maximum. All lanes work on
// every step, on several tokens at once, or with 32 lanes on one, where delay counts and not the number of instructions.
#pragma once

#include "routing/merge.cuh"
#include "routing/topk.cuh"

namespace moe {

// Slots, at most.
constexpr int kSlots = 8;

// 8 logits side by side.
template <typename T>
struct Eight {
    alignas(16) T logits[8];
};

// Chunk c of a row is the experts 8c .. 8c + 8; this is the first of lane `sub`'s i-th chunk.
template <int kLanes>
__device__ __forceinline__ uint32_t first_of_chunk(int i, uint32_t sub) {
    return (i * kLanes + sub) * 8;
}

template <typename T, int kLanes, int kChunks>
__device__ __forceinline__ void load_eights(
    const RoutingArguments& a, const T* row, bool valid, uint32_t sub, Eight<T> (&chunks)[kChunks]) {
    const bool words = a.stride_expert == 1 && a.num_experts % 8 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
    if (words) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const uint32_t first = first_of_chunk<kLanes>(i, sub);
            chunks[i] = {};
            if (valid && first < a.num_experts) load_words<uint4>(row + first, chunks[i].logits);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const uint32_t first = first_of_chunk<kLanes>(i, sub);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const bool in = valid && first + j < a.num_experts;
                keep_one(&chunks[i].logits[j], in ? load_one(row + int64_t(first + j) * a.stride_expert) : 0);
            }
        }
    }
}

// The bias of each of the lane's experts; 0 where there is none, which changes no key.
template <int kLanes, int kChunks>
__device__ __forceinline__ void load_biases(const RoutingArguments& a, uint32_t sub, float (&biases)[kChunks][8]) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        alignas(16) float bias[8] = {};
        const uint32_t first = first_of_chunk<kLanes>(i, sub);
        if (a.bias != nullptr && first + 8 <= a.num_experts) {
            load_words<float4>(a.bias + first, bias);
        } else if (a.bias != nullptr) {
#pragma unroll
            for (int j = 0; j < 8; ++j) bias[j] = first + j < a.num_experts ? __ldg(a.bias + first + j) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) biases[i][j] = bias[j];
    }
}

template <typename T, int kScore>
__device__ __forceinline__ void keys_of_eight(
    const RoutingArguments& a, const Eight<T>& chunk, const float (&bias)[8], uint32_t first, uint32_t (&keys)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float score = score_of<kScore>(to_float(chunk.logits[j]));
        keys[j] = key_of(kScore == kLogit ? score : __fadd_rn(score, bias[j]));
    }
    if (first + 8 > a.num_experts) {
#pragma unroll
        for (int j = 0; j < 8; ++j) keys[j] = first + j < a.num_experts ? keys[j] : kTaken;
    }
}

template <typename T, int kScore>
__device__ __forceinline__ uint32_t key_of_expert(const RoutingArguments& a, const T* row, uint32_t expert) {
    const float score = score_of<kScore>(to_float(row[int64_t(expert) * a.stride_expert]));
    return key_of(kScore != kLogit && a.bias != nullptr ? __fadd_rn(score, __ldg(a.bias + expert)) : score);
}

// Which of the lane's chunks, whose keys are sorted, belong to groups that are kept: bits 8i .. 8i + 8 for the i-th. A group
// is a power of two of chunks side by side, and lanes and chunks hold num_experts without room for more.
template <int kLanes, int kChunks>
__device__ __forceinline__ uint32_t kept_chunks(
    const RoutingArguments& a, uint32_t sub, const uint32_t (&sorted)[kChunks][8]) {
    const uint32_t lanes = 1u << a.group_bits >> 3;
    uint32_t scores[kChunks], better[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        uint32_t first = sorted[i][0], second = sorted[i][1];
        for (uint32_t d = 1; d < lanes; d *= 2) {
            const uint32_t other_first = __shfl_xor_sync(kAllLanes, first, d);
            const uint32_t other_second = __shfl_xor_sync(kAllLanes, second, d);
            second = max(min(first, other_first), max(second, other_second));
            first = max(first, other_first);
        }
        scores[i] = group_key_of(first, second);
        better[i] = 0;
    }
    // Those of all lanes, a few at once, though there may be no lanes so far away; a tie goes to the lower group.
    constexpr int kAtOnce = kLanes / 4;
    for (uint32_t first = 0; first < kLanes; first += kAtOnce * lanes) {
#pragma unroll
        for (int step = 0; step < kAtOnce; ++step) {
            const uint32_t d = first + step * lanes;
            const bool lower = (sub ^ d) < sub;
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                const uint32_t there = __shfl_xor_sync(kAllLanes, scores[j], d & (kLanes - 1));
                const uint32_t other = d < kLanes ? there : kTaken;
#pragma unroll
                for (int i = 0; i < kChunks; ++i) {
                    better[i] += j < i || (j == i && lower) ? other >= scores[i] : other > scores[i];
                }
            }
        }
    }
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) kept |= better[i] < a.topk_group ? 0xffu << (8 * i) : 0;
    return kept;
}

// The sum over the lanes of the token up to this one.
template <int kLanes>
__device__ __forceinline__ uint32_t lanes_through(uint32_t count, uint32_t sub) {
#pragma unroll
    for (uint32_t d = 1; d < kLanes; d *= 2) {
        const uint32_t lower = __shfl_up_sync(kAllLanes, count, d, kLanes);
        count += sub >= d ? lower : 0;
    }
    return count;
}

// Of experts whose keys equal the bound, `room` are chosen, the lowest: which of the lane's, as bits.
template <int kLanes, int kChunks>
__device__ __forceinline__ uint32_t lowest_ties(uint32_t ties, uint32_t room, uint32_t sub) {
    uint32_t chosen = 0, seen = 0;
#pragma unroll 1
    for (int i = 0; i < kChunks; ++i) {
        uint32_t chunk = ties >> (8 * i) & 0xffu;
        const uint32_t count = __popc(chunk);
        const uint32_t through = lanes_through<kLanes>(count, sub);
        const uint32_t before = seen + through - count;
        while (chunk != 0 && before + __popc(chunk) > room) chunk &= ~(0x80000000u >> __clz(chunk));
        chosen |= chunk << (8 * i);
        seen += __shfl_sync(kAllLanes, through, kLanes - 1, kLanes);
    }
    return chosen;
}

// The experts of the lane that are chosen, as bits, and how many are in lanes up to this one.
template <int kLanes, int kChunks>
__device__ __forceinline__ uint32_t chosen_experts(
    const uint32_t (&keys)[kChunks][8], uint32_t kept, uint32_t bound, uint32_t top_k, uint32_t sub, uint32_t& through) {
    uint32_t chosen = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) chosen |= keys[i][j] >= bound ? 1u << (8 * i + j) : 0;
    }
    chosen &= kept;
    through = lanes_through<kLanes>(__popc(chosen), sub);
    const uint32_t total = __shfl_sync(kAllLanes, through, kLanes - 1, kLanes);
    if (__any_sync(kAllLanes, total > top_k)) {
        uint32_t ties = 0;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) ties |= keys[i][j] == bound ? 1u << (8 * i + j) : 0;
        }
        ties &= kept;
        chosen &= ~ties;
        through = lanes_through<kLanes>(__popc(chosen), sub);
        const uint32_t above = __shfl_sync(kAllLanes, through, kLanes - 1, kLanes);
        chosen |= lowest_ties<kLanes, kChunks>(ties, top_k - min(above, top_k), sub);
        through = lanes_through<kLanes>(__popc(chosen), sub);
    }
    return chosen;
}

// The best keys of the token, descending, in all of its lanes: of its first chunk, and of the others that are kept.
template <int kLanes, int kChunks>
__device__ __forceinline__ void best_keys(
    uint32_t (&best)[kSlots], const uint32_t (&sorted)[kChunks][8], uint32_t kept) {
#pragma unroll
    for (int i = 1; i < kChunks; ++i) {
        const bool in = kept >> (8 * i) & 1;
#pragma unroll
        for (int j = 0; j < kSlots; ++j) best[j] = in ? max(best[j], sorted[i][kSlots - 1 - j]) : best[j];
        sort_bitonic<kSlots>(best);
    }
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
        uint32_t other[kSlots];
#pragma unroll
        for (int i = 0; i < kSlots; ++i) other[i] = __shfl_xor_sync(kAllLanes, best[i], d);
        merge_best<kSlots>(best, other);
    }
}

// The expert of lane `sub`'s slot, from the keys and experts of all slots of the token, in any order; ~0 where the lane has
// none. All lanes of the warp call it.
__device__ __forceinline__ uint32_t ranked_expert(uint2* room, uint32_t sub, bool in) {
    if (!in && sub < kSlots) room[sub].x = kTaken;
    __syncwarp();
    const uint2 slot = room[sub % kSlots];
    uint32_t rank = 0;
#pragma unroll
    for (int i = 0; i < kSlots; i += 2) {
        const uint4 two = *reinterpret_cast<const uint4*>(room + i);
        rank += two.x > slot.x || (two.x == slot.x && two.y < slot.y);
        rank += two.z > slot.x || (two.z == slot.x && two.w < slot.y);
    }
    __syncwarp();
    if (in) room[rank].y = slot.y;
    __syncwarp();
    const uint32_t expert = in ? room[sub].y : kNoExpert;
    __syncwarp();
    return expert;
}

// Routes the token of this group of lanes: writes ids and weights of tokens below `end`, those of padding if it is not
// valid, and returns the expert of lane `sub`'s slot. All lanes of the warp call it.
template <typename T, int kScore, int kLanes, int kChunks>
__device__ __forceinline__ uint32_t route_by_threshold(
    const RoutingArguments& a, uint64_t token, uint64_t end, bool valid, uint32_t sub) {
    static_assert(kSlots <= kLanes && kChunks <= 4, "a lane holds a slot, and its experts are bits of a word");
    __shared__ uint4 rooms[kMostWarps][32 / kLanes][kSlots / 2];
    uint2* const room = reinterpret_cast<uint2*>(rooms[threadIdx.x / 32][threadIdx.x % 32 / kLanes]);
    const T* const row = row_of<T>(a, token);

    Eight<T> chunks[kChunks];
    load_eights<T, kLanes, kChunks>(a, row, valid, sub, chunks);
    float biases[kChunks][8];
    if (kScore != kLogit) load_biases<kLanes, kChunks>(a, sub, biases);
    uint32_t keys[kChunks][8], sorted[kChunks][8];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        keys_of_eight<T, kScore>(a, chunks[i], biases[i], first_of_chunk<kLanes>(i, sub), keys[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) sorted[i][j] = keys[i][j];
        sort_keys<8>(sorted[i]);
    }
    uint32_t kept = 0xffffffffu;
    if (kScore != kLogit && a.topk_group < a.num_groups) {
        // A branch of its own for the first chunk: without groups nothing waits for `kept`.
        kept = kept_chunks<kLanes, kChunks>(a, sub, sorted);
#pragma unroll
        for (int j = 0; j < kSlots; ++j) sorted[0][j] = kept & 1 ? sorted[0][j] : kTaken;
    }
    uint32_t(&best)[kSlots] = sorted[0];
    best_keys<kLanes, kChunks>(best, sorted, kept);
    uint32_t bound = best[0];
#pragma unroll
    for (int i = 1; i < kSlots; ++i) bound = a.top_k == i + 1 ? best[i] : bound;

    uint32_t through;
    const uint32_t chosen = chosen_experts<kLanes, kChunks>(keys, valid ? kept : 0, bound, a.top_k, sub, through);
    const bool in = sub < a.top_k;
    uint32_t place = through - __popc(chosen);
    if constexpr (kChunks <= 2) {
#pragma unroll
        for (int i = 0; i < kChunks * 8; ++i) {
            if (chosen >> i & 1) room[place++] = make_uint2(keys[i / 8][i % 8], first_of_chunk<kLanes>(i / 8, sub) + i % 8);
        }
    } else {
        // Registers cannot be chosen by number: the keys are worked out again.
        for (uint32_t left = chosen; left != 0; left &= left - 1) {
            const uint32_t bit = __ffs(left) - 1;
            room[place++].y = first_of_chunk<kLanes>(bit / 8, sub) + bit % 8;
        }
        __syncwarp();
        if (in && valid) room[sub].x = key_of_expert<T, kScore>(a, row, room[sub].y);
    }
    const uint32_t id = ranked_expert(room, sub, in && valid);
    const float logit = in && valid ? to_float(row[int64_t(id) * a.stride_expert]) : 0.0f;
    const float weight = weigh(a.weight, a.factor, logit, in, 1.0f, kSlots);
    if (in && token < end) {
        a.topk_ids[token * a.top_k + sub] = id;
        a.topk_weights[token * a.top_k + sub] = valid ? weight : 0.0f;
    }
    return id;
}

}  // namespace moe

// A kernel for each dtype, score, number of lanes that share a token and 8s of experts that a lane owns:
// KERNEL(type, its name, score, its name, lanes, chunks). The widths are those of src/routing/cuda.rs; of four tokens in a
// warp, of two, and of one.
#define MOE_SCORE_KERNELS(KERNEL, ...)                                \
    KERNEL(float, f32, kSigmoid, sigmoid, __VA_ARGS__)                \
    KERNEL(__half, f16, kSigmoid, sigmoid, __VA_ARGS__)               \
    KERNEL(__nv_bfloat16, bf16, kSigmoid, sigmoid, __VA_ARGS__)       \
    KERNEL(float, f32, kRootSoftplus, root_softplus, __VA_ARGS__)     \
    KERNEL(__half, f16, kRootSoftplus, root_softplus, __VA_ARGS__)    \
    KERNEL(__nv_bfloat16, bf16, kRootSoftplus, root_softplus, __VA_ARGS__)

#define MOE_THRESHOLD_KERNELS_OF_FOUR(KERNEL) \
    KERNEL(float, f32, kLogit, logit, 8, 1)   \
    KERNEL(float, f32, kLogit, logit, 8, 2)   \
    KERNEL(float, f32, kLogit, logit, 8, 3)   \
    KERNEL(float, f32, kLogit, logit, 8, 4)   \
    MOE_SCORE_KERNELS(KERNEL, 8, 1)           \
    MOE_SCORE_KERNELS(KERNEL, 8, 2)

#define MOE_THRESHOLD_KERNELS(KERNEL)         \
    MOE_THRESHOLD_KERNELS_OF_FOUR(KERNEL)     \
    KERNEL(float, f32, kLogit, logit, 16, 3)  \
    KERNEL(float, f32, kLogit, logit, 16, 4)  \
    MOE_SCORE_KERNELS(KERNEL, 16, 2)          \
    MOE_SCORE_KERNELS(KERNEL, 16, 3)          \
    MOE_SCORE_KERNELS(KERNEL, 16, 4)          \
    KERNEL(float, f32, kLogit, logit, 32, 1)  \
    KERNEL(float, f32, kLogit, logit, 32, 2)  \
    MOE_SCORE_KERNELS(KERNEL, 32, 1)          \
    MOE_SCORE_KERNELS(KERNEL, 32, 2)
