// Top-k routing of several tokens by one warp: for 16-bit logits that are compared themselves, and top_k up to kKeep.
//
//     kLanes lanes share a token; each owns 8 * kChunks experts, sorts them and keeps its kKeep best;
//     then neighbours merge their lists, until every lane of the token has the kKeep best of the row
//
// Why it is fast: with many tokens the number of instructions is what limits, and a warp per token (routing/topk.cuh)
// spends most of its lanes' time on one winner after the other. Sorting networks have no branch and no reduction, every lane
// works on every step, and the exponentials, sums and stores of all tokens of the warp are done side by side.
// With few tokens it is slower: its steps are longer.
//
// Keys are those of choose_narrow(): key << 16 | ~expert, so that no two are equal and ties are in the order already.
#pragma once

#include "routing/topk.cuh"

namespace moe {

// Sorts a list that falls and then rises, or the other way round.
template <int K>
__device__ __forceinline__ void sort_bitonic(uint32_t (&keys)[K]) {
#pragma unroll
    for (int d = K / 2; d > 0; d /= 2) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if ((i & d) == 0) order_pair(keys[i], keys[i + d]);
        }
    }
}

// Merges two descending lists into the best of both, descending.
template <int K>
__device__ __forceinline__ void merge_best(uint32_t (&best)[K], const uint32_t (&other)[K]) {
#pragma unroll
    for (int i = 0; i < K; ++i) best[i] = max(best[i], other[K - 1 - i]);
    sort_bitonic<K>(best);
}

// The best of 8 keys, descending.
__device__ __forceinline__ void best_of_eight(uint32_t (&keys)[8], uint32_t (&best)[8]) {
    sort_keys<8>(keys);
#pragma unroll
    for (int i = 0; i < 8; ++i) best[i] = keys[i];
}

__device__ __forceinline__ void best_of_eight(uint32_t (&keys)[8], uint32_t (&best)[4]) {
    uint32_t other[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        best[i] = keys[i];
        other[i] = keys[4 + i];
    }
    sort_keys<4>(best);
    sort_keys<4>(other);
    merge_best<4>(best, other);
}

// Chunk c of a row is the experts 8c .. 8c + 8. Lane `sub` of a token loads the chunks sub, sub + kLanes, ..: neighbours load
// side by side.
template <typename T, int kLanes, int kChunks>
__device__ __forceinline__ void load_chunks(
    const RoutingArguments& a, uint64_t token, bool valid, uint32_t sub, uint4 (&chunks)[kChunks]) {
    const T* const row = row_of<T>(a, token);
    const bool words = a.stride_expert == 1 && a.num_experts % 8 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        const uint32_t first = (i * kLanes + sub) * 8;
        chunks[i] = make_uint4(0, 0, 0, 0);
        if (!valid || first >= a.num_experts) continue;
        if (words) {
            chunks[i] = __ldg(reinterpret_cast<const uint4*>(row + first));
        } else {
            uint32_t bits[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                bits[j] = first + j < a.num_experts ? load_one(row + int64_t(first + j) * a.stride_expert) : 0;
            }
            chunks[i] = make_uint4(
                bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16);
        }
    }
}

// The keys of the 8 experts of a lane's i-th chunk, without the lane's bits of the expert: a lane has the same in all of its
// keys. 16-bit arithmetic in pairs; a NaN is still above infinity or below minus infinity, see make_nan_equal().
template <typename T, int kLanes>
__device__ __forceinline__ void keys_of_chunk(
    const uint4& chunk, int i, uint32_t sub, uint32_t num_experts, uint32_t (&keys)[8]) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const uint32_t bits = words[j / 2], negative = bits & 0x80008000u, one = negative >> 15;
        // 0x8000 + magnitude, or 0x8000 - magnitude.
        const uint32_t pair = (bits ^ ((negative - one) | 0x80008000u)) + one;
        keys[j] = pair << 16 | (0xffffu - i * kLanes * 8 - j);
        keys[j + 1] = (pair & 0xffff0000u) | (0xffffu - i * kLanes * 8 - (j + 1));
    }
    const uint32_t first = (i * kLanes + sub) * 8;
    if (first + 8 > num_experts) {
#pragma unroll
        for (int j = 0; j < 8; ++j) keys[j] = first + j < num_experts ? keys[j] : kTaken;
    }
}

// Gives every NaN of a chunk the bits whose key is kNanKey, and returns whether that changed one.
template <typename T>
__device__ __forceinline__ bool make_nan_equal(uint4& chunk) {
    const auto made = [](uint32_t word) {
        if ((word & 0x7fffu) > Narrow<T>::kInfinity) word |= 0xffffu;
        if ((word >> 16 & 0x7fffu) > Narrow<T>::kInfinity) word |= 0xffff0000u;
        return word;
    };
    const uint4 old = chunk;
    chunk = make_uint4(made(old.x), made(old.y), made(old.z), made(old.w));
    return chunk.x != old.x || chunk.y != old.y || chunk.z != old.z || chunk.w != old.w;
}

// The kKeep best of the token's row in all of its lanes, descending.
template <typename T, int kLanes, int kChunks, int kKeep>
__device__ __forceinline__ void best_of_row(
    uint32_t num_experts, uint32_t sub, const uint4 (&chunks)[kChunks], uint32_t (&best)[kKeep]) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        uint32_t keys[8], of_chunk[kKeep];
        keys_of_chunk<T, kLanes>(chunks[i], i, sub, num_experts, keys);
        if (i == 0) {
            best_of_eight(keys, best);
        } else {
            best_of_eight(keys, of_chunk);
            merge_best<kKeep>(best, of_chunk);
        }
    }
#pragma unroll
    for (int i = 0; i < kKeep; ++i) best[i] ^= sub * 8;
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
        uint32_t other[kKeep];
#pragma unroll
        for (int i = 0; i < kKeep; ++i) other[i] = __shfl_xor_sync(kAllLanes, best[i], d);
        merge_best<kKeep>(best, other);
    }
}

// Routes the token of this group of lanes: writes ids and weights of tokens below `end`, those of padding if it is not
// valid, and returns the expert of lane `sub`'s slot. All lanes of the warp call it.
template <typename T, int kLanes, int kChunks, int kKeep>
__device__ __forceinline__ uint32_t route_merged(
    const RoutingArguments& a, uint64_t token, uint64_t end, bool valid, uint32_t sub) {
    static_assert(kKeep <= kLanes, "a lane weighs one slot");
    uint4 chunks[kChunks];
    load_chunks<T, kLanes, kChunks>(a, token, valid, sub, chunks);
    constexpr uint32_t kMost = (0x8000u + Narrow<T>::kInfinity) << 16 | 0xffffu;
    constexpr uint32_t kLeast = (0x8000u - Narrow<T>::kInfinity) << 16;
    uint32_t best[kKeep];
    // Once more if a NaN is among the best, which hardly ever happens.
#pragma unroll 1
    for (bool again = true; again;) {
        best_of_row<T, kLanes, kChunks, kKeep>(a.num_experts, sub, chunks, best);
        bool changed = false;
        if (__any_sync(kAllLanes, best[0] > kMost || best[kKeep - 1] < kLeast)) {
#pragma unroll
            for (int i = 0; i < kChunks; ++i) changed |= make_nan_equal<T>(chunks[i]);
        }
        again = __any_sync(kAllLanes, changed);
    }
    uint32_t mine = best[0];
#pragma unroll
    for (int i = 1; i < kKeep; ++i) mine = sub == i ? best[i] : mine;
    const bool in = sub < a.top_k;
    const float logit = narrow_value_of<T>(mine >> 16);
    const float weight = weigh(a.weight, a.factor, logit, in, 1.0f, kLanes);
    const uint32_t id = valid ? 0xffffu - (mine & 0xffffu) : kNoExpert;
    if (in && token < end) {
        a.topk_ids[token * a.top_k + sub] = id;
        a.topk_weights[token * a.top_k + sub] = valid ? weight : 0.0f;
    }
    return in ? id : kNoExpert;
}

}  // namespace moe

// A kernel for each dtype, number of lanes that share a token, 8s of experts that a lane owns, and slots that are kept:
// KERNEL(type, its name, lanes, chunks, slots). The widths are those of src/routing/cuda.rs.
#define MOE_MERGE_KERNELS_OF(KERNEL, T, NAME) \
    KERNEL(T, NAME, 4, 1, 4) \
    KERNEL(T, NAME, 4, 2, 4) \
    KERNEL(T, NAME, 4, 3, 4) \
    KERNEL(T, NAME, 4, 4, 4) \
    KERNEL(T, NAME, 8, 3, 4) \
    KERNEL(T, NAME, 8, 4, 4) \
    KERNEL(T, NAME, 8, 1, 8) \
    KERNEL(T, NAME, 8, 2, 8) \
    KERNEL(T, NAME, 8, 3, 8) \
    KERNEL(T, NAME, 8, 4, 8) \
    KERNEL(T, NAME, 16, 3, 8) \
    KERNEL(T, NAME, 16, 4, 8)

#define MOE_MERGE_KERNELS(KERNEL)              \
    MOE_MERGE_KERNELS_OF(KERNEL, __half, f16)  \
    MOE_MERGE_KERNELS_OF(KERNEL, __nv_bfloat16, bf16)
