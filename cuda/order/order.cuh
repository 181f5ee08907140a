// Expert order: topk_ids [num_slots] to the slots of each local expert side by side, in slot order, and the way back.
//
// A chunk is what one block orders: up to 32 * W units, a unit being a token whose slots go to different experts, or one
// slot. Nothing depends on the order in which threads come:
//
//     masks[w][e]    bit b is set if unit 32 * w + b has a slot of expert e
//     rank           of a slot among those of its expert in the chunk: the bits below its own, counted
//     between chunks one row of counts for each chunk, summed up in chunk order
//
// Small batches are one chunk and take one launch. Large ones take two: the first leaves rows and ranks in device memory, and
// every block of the second, `place`, sums up all rows: at most as many as there are multiprocessors, read from the L2 cache
// with all loads under way at once, which costs less than a third launch to sum them once.
#pragma once

#include <type_traits>

#include "common/keys.cuh"
#include "common/launch.cuh"

namespace moe {

constexpr uint32_t kNoSlot = 0xffffffffu;
constexpr uint32_t kNobody = 0xffffu;  // the local expert of a slot that is not in the order

struct OrderArguments {
    const uint32_t* topk_ids;         // [num_slots]
    const uint32_t* replica_offsets;  // [num_experts + 1], or null: the id is the physical expert
    const uint32_t* replicas;         // physical experts, by expert
    uint16_t* chunk_counts;           // [num_chunks, pitch], for two launches
    uint32_t* expert_counts;          // [num_local]
    uint32_t* expert_offsets;         // [num_local + 1]
    uint32_t* sorted_slots;           // [num_slots]
    uint32_t* slot_rank;              // [num_slots]; between two launches local expert << 16 | rank in the chunk
    uint32_t* tile_experts;           // [max_tiles]
    uint32_t* tile_starts;            // [max_tiles]
    uint32_t num_slots;
    uint32_t top_k;
    uint32_t num_experts;  // ids from here on are no experts
    uint32_t turn;         // of the replicas: token t takes replica (t + turn) mod their number
    uint32_t first_local;
    uint32_t num_local;    // less than kNobody
    uint32_t tile_rows;    // 0: no tiles
    uint32_t tile_shift;   // tile_rows is 1 << tile_shift, if this is less than 32
    uint32_t max_tiles;
    uint32_t unit_slots;   // slots of a unit
    uint32_t chunk_words;  // W
    uint32_t num_chunks;
    uint32_t chunks_per_block;  // of `place`
    uint32_t packed;            // 1: sums of the rows that a thread of `place` adds up fit 16 bits
    uint32_t whole;             // 1: one chunk, one launch
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

// The slots of a chunk.
struct Span {
    uint32_t first, end;
};

__device__ __forceinline__ Span chunk_span(const OrderArguments& o, uint32_t chunk) {
    const uint64_t slots = uint64_t(o.chunk_words) * 32 * o.unit_slots;
    const auto clamped = [&](uint64_t slot) { return static_cast<uint32_t>(slot < o.num_slots ? slot : o.num_slots); };
    return {clamped(chunk * slots), clamped((chunk + 1) * slots)};
}

// The shared memory of offsets; src/order/cuda.rs reserves it.
struct Offsets {
    uint32_t* totals;   // [pitch]: slots of each expert
    uint32_t* offsets;  // [pitch + 1]
    uint32_t* tiles;    // [pitch + 1]: offsets of tiles
    uint32_t* scratch;  // [64]

    __device__ __forceinline__ Offsets(uint32_t* memory, uint32_t pitch)
        : totals(memory), offsets(totals + pitch), tiles(offsets + pitch + 1), scratch(tiles + pitch + 1) {}
    __device__ __forceinline__ uint32_t* end() const { return scratch + 64; }
};

// ------------------------------------------------------------------------------------------------------------------
// Offsets

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value, uint32_t lane) {
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t lower = __shfl_up_sync(kAllLanes, value, d);
        if (lane >= d) value += lower;
    }
    return value;
}

// The sums of two values over all threads before this one. All threads call it; `scratch` has 64 words.
__device__ __forceinline__ void block_exclusive_sums(uint32_t& a, uint32_t& b, uint32_t* scratch) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t up_to_a = warp_inclusive_sum(a, lane), up_to_b = warp_inclusive_sum(b, lane);
    if (lane == 31) {
        scratch[warp] = up_to_a;
        scratch[32 + warp] = up_to_b;
    }
    __syncthreads();
    a = up_to_a - a + __reduce_add_sync(kAllLanes, lane < warp ? scratch[lane] : 0);
    b = up_to_b - b + __reduce_add_sync(kAllLanes, lane < warp ? scratch[32 + lane] : 0);
}

__device__ __forceinline__ uint32_t tiles_of(uint32_t count, uint32_t tile_rows, uint32_t tile_shift) {
    if (tile_rows == 0) return 0;
    // Not (count + tile_rows - 1) / tile_rows, which may wrap.
    return tile_shift < 32 ? (count >> tile_shift) + ((count & (tile_rows - 1)) != 0)
                           : count / tile_rows + (count % tile_rows != 0);
}

// From the slots of each expert, which `total_of` tells once, to offsets of slots and tiles. All threads call it; a barrier
// stands before the end.
template <typename TotalOf>
__device__ __forceinline__ void scan_experts(const OrderArguments& o, const Offsets& s, TotalOf total_of) {
    const uint32_t per_thread = (o.num_local + blockDim.x - 1) / blockDim.x;
    const uint32_t first = min(threadIdx.x * per_thread, o.num_local);
    const uint32_t end = min(first + per_thread, o.num_local);
    uint32_t slots = 0, tiles = 0;
    for (uint32_t e = first; e < end; ++e) {
        const uint32_t total = total_of(e);
        s.totals[e] = total;
        slots += total;
        tiles += tiles_of(total, o.tile_rows, o.tile_shift);
    }
    block_exclusive_sums(slots, tiles, s.scratch);
    for (uint32_t e = first; e < end; ++e) {
        const uint32_t total = s.totals[e];
        s.offsets[e] = slots;
        s.tiles[e] = tiles;
        slots += total;
        tiles += tiles_of(total, o.tile_rows, o.tile_shift);
    }
    if (first < end && end == o.num_local) {
        s.offsets[end] = slots;
        s.tiles[end] = tiles;
    }
    if (o.num_local == 0 && threadIdx.x == 0) s.offsets[0] = s.tiles[0] = 0;
    __syncthreads();
}

// The tiles of all experts, a warp those of one, and the rest of the map.
template <typename Arguments>
__device__ __forceinline__ void write_tiles(
    const Arguments& a, const uint32_t* offsets, const uint32_t* tiles, uint32_t thread, uint32_t num_threads) {
    for (uint32_t e = thread / 32; e < a.num_local; e += num_threads / 32) {
        const uint32_t first = tiles[e], count = tiles[e + 1] - first;
        for (uint32_t i = threadIdx.x % 32; i < count; i += 32) {
            a.tile_experts[first + i] = e;
            a.tile_starts[first + i] = offsets[e] + i * a.tile_rows;
        }
    }
    for (uint64_t t = uint64_t(tiles[a.num_local]) + thread; t < a.max_tiles; t += num_threads) {
        a.tile_experts[t] = 0xffffffffu;
        a.tile_starts[t] = kNoSlot;
    }
}

// Counts, offsets, tiles, and the places behind the last slot: all blocks write their part.
__device__ __forceinline__ void write_experts(const OrderArguments& o, const Offsets& s) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, num_threads = gridDim.x * blockDim.x;
    for (uint32_t e = thread; e <= o.num_local; e += num_threads) {
        if (e < o.num_local) o.expert_counts[e] = s.totals[e];
        o.expert_offsets[e] = s.offsets[e];
    }
    if (o.max_tiles > 0) write_tiles(o, s.offsets, s.tiles, thread, num_threads);
    for (uint64_t i = uint64_t(s.offsets[o.num_local]) + thread; i < o.num_slots; i += num_threads) {
        o.sorted_slots[i] = kNoSlot;
    }
}

// ------------------------------------------------------------------------------------------------------------------
// One chunk

// The shared memory of a block that counts.
struct Counters {
    uint32_t* masks;    // [W, pitch]
    uint16_t* before;   // [W, pitch]: bits of the words before
    uint16_t* experts;  // [slots of the chunk]: local experts
    uint32_t pitch;

    // Sets unit `unit` of the chunk for slot `slot` of the chunk.
    __device__ __forceinline__ void mark(uint32_t unit, uint32_t slot, uint32_t expert) const {
        experts[slot] = static_cast<uint16_t>(expert);
        if (expert != kNobody) atomicOr(&masks[unit / 32 * pitch + expert], 1u << unit % 32);
    }

    __device__ __forceinline__ uint32_t count(uint32_t expert, uint32_t words) const {
        uint32_t sum = 0;
        for (uint32_t w = 0; w < words; ++w) {
            if (w > 0) before[w * pitch + expert] = static_cast<uint16_t>(sum);
            sum += __popc(masks[w * pitch + expert]);
        }
        return sum;
    }

    __device__ __forceinline__ uint32_t rank(uint32_t unit, uint32_t expert) const {
        const uint32_t word = unit / 32, at = word * pitch + expert;
        const uint32_t lower = __popc(masks[at] & ((1u << unit % 32) - 1));
        return word == 0 ? lower : before[at] + lower;
    }
};

// What follows when all slots are marked and seen.
__device__ __forceinline__ void finish_chunk(const OrderArguments& o, const Counters& c, uint32_t* memory) {
    const Span span = chunk_span(o, blockIdx.x);
    const auto each_slot = [&](auto write) {
        for (uint32_t i = threadIdx.x; i < span.end - span.first; i += blockDim.x) {
            const uint32_t expert = c.experts[i];
            const uint32_t unit = o.unit_slots == 1 ? i : i / o.unit_slots;
            write(span.first + i, expert, expert != kNobody ? c.rank(unit, expert) : 0);
        }
    };
    if (o.whole) {
        const Offsets s(memory, c.pitch);
        scan_experts(o, s, [&](uint32_t e) { return c.count(e, o.chunk_words); });
        each_slot([&](uint32_t slot, uint32_t expert, uint32_t rank) {
            const uint32_t place = expert != kNobody ? s.offsets[expert] + rank : kNoSlot;
            o.slot_rank[slot] = place;
            if (expert != kNobody) o.sorted_slots[place] = slot;
        });
        write_experts(o, s);
        return;
    }
    uint16_t* const row = o.chunk_counts + uint64_t(blockIdx.x) * c.pitch;
    for (uint32_t e = threadIdx.x; e < c.pitch; e += blockDim.x) {
        row[e] = static_cast<uint16_t>(c.count(e, o.chunk_words));
    }
    __syncthreads();
    each_slot([&](uint32_t slot, uint32_t expert, uint32_t rank) { o.slot_rank[slot] = expert << 16 | rank; });
}

// Orders the block's chunk; `mark_all` marks every slot of it.
template <typename MarkAll>
__device__ __forceinline__ void order_chunk(const OrderArguments& o, MarkAll mark_all) {
    MOE_DYNAMIC_SHARED(uint32_t, memory);
    const uint32_t pitch = pitch_of(o), counters = o.chunk_words * pitch;
    uint16_t* const before = reinterpret_cast<uint16_t*>(memory + counters);
    const Counters c{memory, before, before + counters, pitch};
    for (uint32_t i = threadIdx.x; i < counters; i += blockDim.x) c.masks[i] = 0;
    __syncthreads();
    mark_all(c);
    __syncthreads();
    const uint32_t chunk_slots = o.chunk_words * 32 * o.unit_slots;
    finish_chunk(o, c, memory + counters + (counters + chunk_slots + 1) / 2);
}

// ------------------------------------------------------------------------------------------------------------------
// The second launch

// Adds up 8 counts of 16 bits, in pairs or each for itself.
template <bool kPacked>
struct Sums {
    static constexpr int kWords = kPacked ? 4 : 8;
    uint32_t words[kWords] = {};

    __device__ __forceinline__ void add(const uint4& counts) {
        const uint32_t pairs[4] = {counts.x, counts.y, counts.z, counts.w};
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] += kPacked ? pairs[i] : pairs[i / 2] >> (i % 2 * 16) & 0xffffu;
    }
};

// Sums up the rows of all chunks, and those before chunk `first`: a thread adds some rows of 8 experts, and leaves both sums
// in shared memory, `totals` and `befores`, both of type Sum [groups, pitch].
template <bool kPacked>
__device__ __forceinline__ void sum_rows(
    const OrderArguments& o, uint32_t pitch, uint32_t groups, uint32_t first, uint32_t* totals, uint32_t* befores) {
    const uint32_t columns = pitch / 8;
    for (uint32_t i = threadIdx.x; i < columns * groups; i += blockDim.x) {
        const uint32_t column = i % columns, group = i / columns;
        Sums<kPacked> total, before;
        const uint16_t* const at = o.chunk_counts + column * 8;
#pragma unroll 8
        for (uint32_t row = group; row < o.num_chunks; row += groups) {
            const uint4 counts = *reinterpret_cast<const uint4*>(at + uint64_t(row) * pitch);
            total.add(counts);
            if (row < first) before.add(counts);
        }
        const uint32_t to = i * Sums<kPacked>::kWords;
#pragma unroll
        for (int j = 0; j < Sums<kPacked>::kWords; ++j) {
            totals[to + j] = total.words[j];
            befores[to + j] = before.words[j];
        }
    }
}

// Slots that a thread of `place` has under way.
constexpr int kBatch = 4;

template <bool kPacked>
__device__ __forceinline__ void place_chunks(const OrderArguments& o, uint32_t* memory) {
    using Sum = std::conditional_t<kPacked, uint16_t, uint32_t>;
    const uint32_t pitch = pitch_of(o), columns = max(pitch / 8, 1u);
    const uint32_t groups = max(blockDim.x / columns, 1u);
    uint32_t* const totals = memory;
    uint32_t* const befores = totals + groups * columns * Sums<kPacked>::kWords;
    const Offsets s(befores + groups * columns * Sums<kPacked>::kWords, pitch);
    uint32_t* const base = s.end();  // [pitch]: the place of the chunk's first slot of each expert
    const uint32_t first = blockIdx.x * o.chunks_per_block;
    const uint32_t end = min(first + o.chunks_per_block, o.num_chunks);

    // The first slots are on their way while the rows are summed up.
    Span span = chunk_span(o, first);
    uint32_t batch[kBatch];
    const auto load = [&](uint64_t from) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const uint64_t slot = from + i * blockDim.x;
            batch[i] = slot < span.end ? o.slot_rank[slot] : kNoSlot;
        }
    };
    load(uint64_t(span.first) + threadIdx.x);

    sum_rows<kPacked>(o, pitch, groups, first, totals, befores);
    __syncthreads();
    const auto sum_of = [&](const uint32_t* sums, uint32_t e) {
        uint32_t sum = 0;
        for (uint32_t g = 0; g < groups; ++g) sum += reinterpret_cast<const Sum*>(sums)[g * pitch + e];
        return sum;
    };
    scan_experts(o, s, [&](uint32_t e) {
        base[e] = sum_of(befores, e);
        return sum_of(totals, e);
    });
    for (uint32_t e = threadIdx.x; e < o.num_local; e += blockDim.x) base[e] += s.offsets[e];
    __syncthreads();

    for (uint32_t chunk = first; chunk < end; ++chunk) {
        for (uint64_t from = uint64_t(span.first) + threadIdx.x; from < span.end; from += kBatch * blockDim.x) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const uint64_t slot = from + i * blockDim.x;
                const uint32_t expert = batch[i] >> 16;
                const uint32_t place = expert != kNobody ? base[expert] + (batch[i] & 0xffffu) : kNoSlot;
                if (slot < span.end) o.slot_rank[slot] = place;
                if (expert != kNobody) o.sorted_slots[place] = static_cast<uint32_t>(slot);
            }
            load(from + kBatch * blockDim.x);
        }
        if (chunk + 1 == end) break;
        __syncthreads();
        const uint16_t* const row = o.chunk_counts + uint64_t(chunk) * pitch;
        for (uint32_t e = threadIdx.x; e < o.num_local; e += blockDim.x) base[e] += row[e];
        span = chunk_span(o, chunk + 1);
        load(uint64_t(span.first) + threadIdx.x);
        __syncthreads();
    }
    write_experts(o, s);
}

}  // namespace moe
