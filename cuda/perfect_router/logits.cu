// Perfect-router logits [num_rows, num_experts]: one value at the experts that the plan gives a token, one everywhere else.
//
// One warp per row: it fills the row, 16 bytes for each lane where they lie so, and then marks the planned experts. The plan
// is one of three, all with the numbers of src/perfect_router/:
//
//     flat      closed form (flat.rs)
//     grouped   a round that repeats, in cells that each go round their own experts (planner/mod.rs)
//     listed    the experts of every token of the period

#include <cstdint>

namespace moe {

enum Kind : uint32_t { kFlat = 0, kGrouped = 1, kListed = 2 };

struct LogitsArguments {
    void* logits;            // [num_rows, num_experts]
    const uint32_t* slots;   // grouped: [round, top_k] of {cell, slots of the cell before it}; listed: [period, top_k]
    const uint32_t* cells;   // grouped: {first expert, experts, slots of a round modulo experts} of each
    uint64_t num_rows;
    uint64_t period;         // tokens after which the plan begins anew
    uint64_t slot_period;    // flat: slots after which it does
    uint32_t num_experts;
    uint32_t top_k;
    uint32_t kind;
    uint32_t round;          // grouped: tokens
    uint32_t ep_size;        // flat, as are all that follow
    uint32_t ep_rank;
    uint32_t is_saturated;
    uint32_t planned;        // the bits of the two logits
    uint32_t others;
};

// The first expert and the number of experts of a rank: the first ranks have one more.
__device__ __forceinline__ uint2 experts_of(const LogitsArguments& a, uint32_t rank) {
    const uint32_t shorter = a.num_experts / a.ep_size, num_longer = a.num_experts % a.ep_size;
    return {rank * shorter + min(rank, num_longer), shorter + (rank < num_longer)};
}

__device__ __forceinline__ uint32_t flat_expert(const LogitsArguments& a, uint64_t token, uint32_t k) {
    const uint64_t g = token * a.top_k % a.slot_period + a.ep_rank + k;
    if (a.is_saturated) {
        const uint32_t place = static_cast<uint32_t>(g % a.num_experts);
        return experts_of(a, place % a.ep_size).x + place / a.ep_size;
    }
    const uint2 local = experts_of(a, static_cast<uint32_t>(g % a.ep_size));
    return local.x + static_cast<uint32_t>(g / a.ep_size % local.y);
}

__device__ __forceinline__ uint32_t grouped_expert(const LogitsArguments& a, uint64_t token, uint32_t k) {
    const uint32_t* const slot = a.slots + (token % a.round * a.top_k + k) * 2;
    const uint32_t* const cell = a.cells + uint64_t(slot[0]) * 3;
    const uint64_t size = cell[1];
    const uint64_t before = token / a.round % size * cell[2] + slot[1];
    return cell[0] + static_cast<uint32_t>(before % size);
}

__device__ __forceinline__ uint32_t planned_expert(const LogitsArguments& a, uint64_t token, uint32_t k) {
    switch (a.kind) {
        case kFlat: return flat_expert(a, token, k);
        case kGrouped: return grouped_expert(a, token, k);
        default: return a.slots[token * a.top_k + k];
    }
}

// Fills `len` elements from `row` on, whose bits are `value`.
template <typename T>
__device__ __forceinline__ void fill_row(T* row, uint32_t len, T value, uint32_t lane) {
    constexpr uint32_t kPer = 16 / sizeof(T);
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0) {
        const uint32_t word = sizeof(T) == 4 ? value : value * 0x10001u;
        const uint32_t whole = len / kPer;
        for (uint32_t i = lane; i < whole; i += 32) reinterpret_cast<uint4*>(row)[i] = uint4{word, word, word, word};
        for (uint32_t i = whole * kPer + lane; i < len; i += 32) row[i] = value;
    } else {
        for (uint32_t i = lane; i < len; i += 32) row[i] = value;
    }
}

template <typename T>
__device__ __forceinline__ void write_row(const LogitsArguments& a) {
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t token = uint64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (token >= a.num_rows) return;
    T* const row = static_cast<T*>(a.logits) + token * a.num_experts;
    fill_row(row, a.num_experts, static_cast<T>(a.others), lane);
    __syncwarp();
    for (uint32_t k = lane; k < a.top_k; k += 32) row[planned_expert(a, token % a.period, k)] = static_cast<T>(a.planned);
}

}  // namespace moe

extern "C" __global__ void __launch_bounds__(256) logits_16(const moe::LogitsArguments a) { moe::write_row<uint16_t>(a); }
extern "C" __global__ void __launch_bounds__(256) logits_32(const moe::LogitsArguments a) { moe::write_row<uint32_t>(a); }
