// Expert order: topk_ids [num_slots] to the slots of each local expert side by side, in slot order, and the way back.
//
// A chunk is what one block counts: consecutive slots, cut into consecutive parts for its warps. No atomic decides an order:
//
//     inside a warp    slots are counted in order; a slot's place is what its expert's counter held
//     inside a block   the warps' counters are summed up in warp order
//     between blocks   the blocks' counters, one row for each chunk, are summed up in chunk order
//
// Small batches take one launch: one block, or one cluster whose blocks read each other's row in shared memory. Large ones
// take two: `count` leaves the rows in device memory, and every block of `place` reads all of them, from the L2 cache: with
// 264 chunks and 256 experts 132 KB for each of 132 blocks, which costs less than a third launch to sum them once.
#pragma once

#include "common/keys.cuh"
#include "common/launch.cuh"

namespace moe {

constexpr uint32_t kNoSlot = 0xffffffffu;
constexpr uint32_t kNobody = 0xffffffffu;  // the id of no expert

struct OrderArguments {
    const uint32_t* topk_ids;         // [num_slots]
    const uint32_t* replica_offsets;  // [num_experts + 1], or null: the id is the physical expert
    const uint32_t* replicas;         // physical experts, by expert
    uint16_t* chunk_counts;           // [num_chunks, pitch], for two launches
    uint32_t* expert_counts;          // [num_local]
    uint32_t* expert_offsets;         // [num_local + 1]
    uint32_t* sorted_slots;           // [num_slots]
    uint32_t* slot_rank;              // [num_slots]
    uint32_t* tile_experts;           // [max_tiles]
    uint32_t* tile_starts;            // [max_tiles]
    uint32_t num_slots;
    uint32_t top_k;
    uint32_t num_experts;  // ids from here on are no experts
    uint32_t turn;         // of the replicas: token t takes replica (t + turn) mod their number
    uint32_t first_local;
    uint32_t num_local;
    uint32_t tile_rows;    // 0: no tiles
    uint32_t max_tiles;
    uint32_t warp_slots;   // slots of a warp; a chunk has this for each warp
    uint32_t num_chunks;
    uint32_t chunks_per_block;  // of `place`
    uint32_t whole;             // 1: one launch
};

// A row of counters, padded so that rows are read 16 bytes at a time.
__device__ __forceinline__ uint32_t pitch_of(const OrderArguments& o) { return (o.num_local + 7) / 8 * 8; }

// The local expert of a slot, or kNobody.
__device__ __forceinline__ uint32_t local_expert(const OrderArguments& o, uint32_t slot, uint32_t id) {
    if (id >= o.num_experts) return kNobody;
    uint32_t expert = id;
    if (o.replica_offsets != nullptr) {
        const uint32_t first = o.replica_offsets[id], count = o.replica_offsets[id + 1] - first;
        expert = o.replicas[first + (slot / o.top_k % count + o.turn % count) % count];
    }
    expert -= o.first_local;  // wraps far beyond num_local below it
    return expert < o.num_local ? expert : kNobody;
}

// The shared memory of a block; src/order/cuda.rs reserves it.
struct OrderShared {
    uint32_t* totals;        // [pitch], transposed: see place_of
    uint32_t* base;          // [pitch], transposed: slots of earlier chunks, then the place of the chunk's first slot
    uint32_t* offsets;       // [pitch + 1]
    uint32_t* tile_offsets;  // [pitch + 1]
    uint32_t* scratch;       // [64]
    uint16_t* row;           // [pitch]: the block's counters
    uint16_t* warp_counts;   // [warps, pitch]

    __device__ __forceinline__ OrderShared(uint32_t* memory, uint32_t pitch) {
        row = reinterpret_cast<uint16_t*>(memory);  // 16-byte aligned, to be read so
        totals = memory + pitch / 2;
        base = totals + pitch;
        offsets = base + pitch;
        tile_offsets = offsets + pitch + 1;
        scratch = tile_offsets + pitch + 1;
        warp_counts = reinterpret_cast<uint16_t*>(scratch + 64);
    }
};

// ------------------------------------------------------------------------------------------------------------------
// Counting

// Counts slots of different experts; returns how many slots of its expert the warp has seen before.
__device__ __forceinline__ uint32_t count_distinct(uint16_t* counts, uint32_t expert) {
    uint32_t before = kNoSlot;
    if (expert != kNobody) {
        before = counts[expert];
        counts[expert] = static_cast<uint16_t>(before + 1);
    }
    __syncwarp();
    return before;
}

// The same for any experts, lanes in slot order.
__device__ __forceinline__ uint32_t count_any(uint16_t* counts, uint32_t expert, uint32_t lane) {
    const uint32_t peers = __match_any_sync(kAllLanes, expert);
    const uint32_t lower = __popc(peers & ((1u << lane) - 1));
    const uint32_t before = expert != kNobody ? counts[expert] + lower : kNoSlot;
    __syncwarp();
    if (expert != kNobody && lower == 0) counts[expert] = static_cast<uint16_t>(before + __popc(peers));
    __syncwarp();
    return before;
}

// The slots of this warp.
struct Span {
    uint32_t first, end;
};

__device__ __forceinline__ Span warp_span(const OrderArguments& o) {
    const uint64_t warp = uint64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const auto clamped = [&](uint64_t slot) { return static_cast<uint32_t>(slot < o.num_slots ? slot : o.num_slots); };
    return {clamped(warp * o.warp_slots), clamped((warp + 1) * o.warp_slots)};
}

// From the counts of each warp to those of the warps before it, and the block's row.
__device__ __forceinline__ void scan_warps(const OrderShared& s, uint32_t pitch) {
    for (uint32_t e = threadIdx.x; e < pitch; e += blockDim.x) {
        uint32_t sum = 0;
        for (uint32_t w = 0; w < blockDim.x / 32; ++w) {
            const uint32_t count = s.warp_counts[w * pitch + e];
            s.warp_counts[w * pitch + e] = static_cast<uint16_t>(sum);
            sum += count;
        }
        s.row[e] = static_cast<uint16_t>(sum);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Placing

// Where the sums of expert e stand in `totals` and `base`, which are summed up kWide experts at a time: neighbouring threads
// add to neighbouring words.
template <int kWide>
__device__ __forceinline__ uint32_t place_of(uint32_t e, uint32_t pitch) {
    return e % kWide * (pitch / kWide) + e / kWide;
}

// Sums up the rows: all of them in `totals`, those before row `first` in `base` too. Both are 0 before.
template <int kWide, typename RowOf>
__device__ __forceinline__ void sum_rows(
    const OrderShared& s, uint32_t pitch, uint32_t num_rows, uint32_t first, RowOf row_of) {
    const uint32_t columns = pitch / kWide;
    if (columns == 0) return;
    const uint32_t groups = blockDim.x > columns ? blockDim.x / columns : 1;
    for (uint32_t i = threadIdx.x; i < columns * groups; i += blockDim.x) {
        const uint32_t column = i % columns, group = i / columns;
        if (group >= num_rows) continue;
        uint32_t total[kWide] = {}, before[kWide] = {};
#pragma unroll 4
        for (uint32_t row = group; row < num_rows; row += groups) {
            uint32_t pairs[kWide / 2];
            const uint16_t* const at = row_of(row) + column * kWide;
            if constexpr (kWide == 8) {
                *reinterpret_cast<uint4*>(pairs) = *reinterpret_cast<const uint4*>(at);
            } else {
                pairs[0] = *reinterpret_cast<const uint32_t*>(at);
            }
#pragma unroll
            for (int j = 0; j < kWide; ++j) {
                const uint32_t count = pairs[j / 2] >> (j % 2 * 16) & 0xffffu;
                total[j] += count;
                before[j] += row < first ? count : 0;
            }
        }
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            // Whole numbers: their sum does not depend on the order.
            atomicAdd(&s.totals[j * columns + column], total[j]);
            if (first > 0) atomicAdd(&s.base[j * columns + column], before[j]);
        }
    }
}

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value, uint32_t lane) {
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t lower = __shfl_up_sync(kAllLanes, value, d);
        if (lane >= d) value += lower;
    }
    return value;
}

// The sum of `value` over all threads before this one. All threads call it; `scratch` has 32 words.
__device__ __forceinline__ uint32_t block_exclusive_sum(uint32_t value, uint32_t* scratch) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t inclusive = warp_inclusive_sum(value, lane);
    if (lane == 31) scratch[warp] = inclusive;
    __syncthreads();
    const uint32_t of_warp = lane < blockDim.x / 32 ? scratch[lane] : 0;
    const uint32_t up_to = warp_inclusive_sum(of_warp, lane);
    const uint32_t earlier = __shfl_sync(kAllLanes, up_to - of_warp, warp);
    return earlier + inclusive - value;
}

// From `totals` and `base` to the offsets of experts and tiles, and the place of the chunk's first slot of each expert.
template <int kWide>
__device__ __forceinline__ void scan_experts(const OrderArguments& o, const OrderShared& s, uint32_t pitch) {
    const uint32_t per_thread = (o.num_local + blockDim.x - 1) / blockDim.x;
    const uint32_t first = min(threadIdx.x * per_thread, o.num_local);
    const uint32_t end = min(first + per_thread, o.num_local);
    const auto tiles_of = [&](uint32_t count) {
        return o.tile_rows == 0 ? 0 : count / o.tile_rows + (count % o.tile_rows != 0);
    };
    uint32_t slots = 0, tiles = 0;
    for (uint32_t e = first; e < end; ++e) {
        const uint32_t count = s.totals[place_of<kWide>(e, pitch)];
        slots += count;
        tiles += tiles_of(count);
    }
    slots = block_exclusive_sum(slots, s.scratch);
    tiles = o.tile_rows == 0 ? 0 : block_exclusive_sum(tiles, s.scratch + 32);
    for (uint32_t e = first; e < end; ++e) {
        const uint32_t place = place_of<kWide>(e, pitch), count = s.totals[place];
        s.offsets[e] = slots;
        s.tile_offsets[e] = tiles;
        s.base[place] += slots;
        slots += count;
        tiles += tiles_of(count);
    }
    if (first < end && end == o.num_local) {
        s.offsets[end] = slots;
        s.tile_offsets[end] = tiles;
    }
    if (o.num_local == 0 && threadIdx.x == 0) s.offsets[0] = s.tile_offsets[0] = 0;
}

// The expert of tile t, which exists: the last one whose tiles begin at t or before.
__device__ __forceinline__ uint32_t tile_expert(const uint32_t* tile_offsets, uint32_t num_local, uint32_t t) {
    uint32_t low = 0, high = num_local;  // tile_offsets[low] <= t < tile_offsets[high]
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        if (tile_offsets[middle] <= t) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// What does not belong to a chunk: counts, offsets, tiles, and the places behind the last slot.
template <int kWide>
__device__ __forceinline__ void write_experts(const OrderArguments& o, const OrderShared& s, uint32_t pitch) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, num_threads = gridDim.x * blockDim.x;
    for (uint32_t e = thread; e < o.num_local; e += num_threads) o.expert_counts[e] = s.totals[place_of<kWide>(e, pitch)];
    for (uint32_t e = thread; e <= o.num_local; e += num_threads) o.expert_offsets[e] = s.offsets[e];
    const uint32_t num_tiles = s.tile_offsets[o.num_local];
    for (uint32_t t = thread; t < o.max_tiles; t += num_threads) {
        uint32_t expert = kNobody, start = kNoSlot;
        if (t < num_tiles) {
            expert = tile_expert(s.tile_offsets, o.num_local, t);
            start = s.offsets[expert] + (t - s.tile_offsets[expert]) * o.tile_rows;
        }
        o.tile_experts[t] = expert;
        o.tile_starts[t] = start;
    }
    // In 64 bits, since the last step may lead beyond 32.
    const uint64_t total = s.offsets[o.num_local];
    for (uint64_t i = total + thread; i < o.num_slots; i += num_threads) o.sorted_slots[i] = kNoSlot;
}

// Zeroes the sums, sums up the rows, and makes offsets and places of them.
template <int kWide, typename RowOf>
__device__ __forceinline__ void sum_and_scan(
    const OrderArguments& o, const OrderShared& s, uint32_t pitch, uint32_t num_rows, uint32_t first, RowOf row_of) {
    for (uint32_t i = threadIdx.x; i < pitch; i += blockDim.x) s.totals[i] = s.base[i] = 0;
    __syncthreads();
    sum_rows<kWide>(s, pitch, num_rows, first, row_of);
    __syncthreads();
    scan_experts<kWide>(o, s, pitch);
    __syncthreads();
    write_experts<kWide>(o, s, pitch);
}

// Places the slots of `span`, whose places so far count from where `before` says.
template <int kWide>
__device__ __forceinline__ void place_slots(
    const OrderArguments& o, const OrderShared& s, uint32_t pitch, Span span, uint32_t thread, uint32_t num_threads,
    const uint16_t* before) {
    for (uint64_t i = uint64_t(span.first) + thread; i < span.end; i += num_threads) {
        const uint32_t slot = static_cast<uint32_t>(i);
        const uint32_t expert = local_expert(o, slot, o.topk_ids[slot]);
        if (expert == kNobody) continue;
        const uint32_t earlier = before == nullptr ? 0 : before[expert];
        const uint32_t rank = s.base[place_of<kWide>(expert, pitch)] + earlier + o.slot_rank[slot];
        o.slot_rank[slot] = rank;
        o.sorted_slots[rank] = slot;
    }
}

template <int kWide>
__device__ __forceinline__ void place_in_cluster(const OrderArguments& o, const OrderShared& s, uint32_t pitch) {
    const auto row_of = [&](uint32_t rank) { return in_block(s.row, rank); };
    sum_and_scan<kWide>(o, s, pitch, cluster_size(), cluster_rank(), row_of);
    place_slots<kWide>(o, s, pitch, warp_span(o), threadIdx.x % 32, 32, s.warp_counts + threadIdx.x / 32 * pitch);
}

// What follows when all warps have counted. Not inlined: the kernels that count are many.
static __device__ __attribute__((noinline)) void finish_chunk(const OrderArguments& o, uint32_t* memory) {
    const uint32_t pitch = pitch_of(o), lane = threadIdx.x % 32;
    const OrderShared s(memory, pitch);
    scan_warps(s, pitch);
    if (o.whole) {
        cluster_sync();
        if (pitch >= 128) {
            place_in_cluster<8>(o, s, pitch);
        } else {
            place_in_cluster<2>(o, s, pitch);
        }
        cluster_sync();  // a block must not leave while others read its row
        return;
    }
    __syncthreads();
    uint16_t* const row = o.chunk_counts + uint64_t(blockIdx.x) * pitch;
    for (uint32_t e = threadIdx.x; e < pitch; e += blockDim.x) row[e] = s.row[e];
    const uint16_t* const before = s.warp_counts + threadIdx.x / 32 * pitch;
    const Span span = warp_span(o);
    for (uint64_t i = uint64_t(span.first) + lane; i < span.end; i += 32) {
        const uint32_t slot = static_cast<uint32_t>(i);
        const uint32_t expert = local_expert(o, slot, o.topk_ids[slot]);
        if (expert != kNobody) o.slot_rank[slot] += before[expert];
    }
}

// One block's part of the order. `count` counts the slots of this warp and leaves in slot_rank how many of their expert the
// warp has seen before, or kNoSlot.
template <typename Count>
__device__ __forceinline__ void order_chunk(const OrderArguments& o, Count count) {
    MOE_DYNAMIC_SHARED(uint32_t, memory);
    const uint32_t pitch = pitch_of(o);
    uint16_t* const counts = OrderShared(memory, pitch).warp_counts + threadIdx.x / 32 * pitch;
    for (uint32_t e = threadIdx.x % 32; e < pitch; e += 32) counts[e] = 0;
    __syncwarp();
    count(counts);
    __syncthreads();
    finish_chunk(o, memory);
}

// The second launch: places the chunks that were counted.
template <int kWide>
__device__ __forceinline__ void place_chunks(const OrderArguments& o, uint32_t chunk_slots) {
    MOE_DYNAMIC_SHARED(uint32_t, memory);
    const uint32_t pitch = pitch_of(o);
    const OrderShared s(memory, pitch);
    const auto row_of = [&](uint32_t chunk) { return o.chunk_counts + uint64_t(chunk) * pitch; };
    const uint32_t first = blockIdx.x * o.chunks_per_block;
    const uint32_t end = min(first + o.chunks_per_block, o.num_chunks);
    sum_and_scan<kWide>(o, s, pitch, o.num_chunks, first, row_of);
    for (uint32_t chunk = first; chunk < end; ++chunk) {
        const auto clamped = [&](uint64_t slot) { return static_cast<uint32_t>(slot < o.num_slots ? slot : o.num_slots); };
        const Span span{clamped(uint64_t(chunk) * chunk_slots), clamped(uint64_t(chunk + 1) * chunk_slots)};
        place_slots<kWide>(o, s, pitch, span, threadIdx.x, blockDim.x, nullptr);
        if (chunk + 1 == end) break;
        __syncthreads();
        for (uint32_t e = threadIdx.x; e < pitch; e += blockDim.x) s.base[place_of<kWide>(e, pitch)] += row_of(chunk)[e];
        __syncthreads();
    }
}

}  // namespace moe
