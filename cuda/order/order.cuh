// Expert order: topk_ids [num_slots] to the slots of each local expert side by side, in slot order, and the way back.
//
// A chunk is what one block orders: some units, up to 32 * W, a unit being a token whose slots go to different experts, or one
// slot. Nothing depends on the order in which threads come:
//
//     masks[w][e]    bit b is set if unit 32 * w + b has a slot of expert e
//     rank           of a slot among those of its expert in the chunk: the bits below its own, counted
//     between chunks one row of counts for each chunk, summed up in chunk order
//
// Up to 16 slots are compared with each other instead: see finish_few(). Small batches are one chunk and take one launch. Large ones take two: the first leaves rows and ranks in device memory, and
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
    uint32_t unit_inverse; // 2^32 / unit_slots, rounded up, if that is more than 1
    uint32_t chunk_units;
    uint32_t chunk_words;  // W
    uint32_t num_chunks;
    uint32_t chunks_per_block;  // of `place`
    uint32_t group_bits;        // `place` adds up rows in 1 << group_bits groups of threads
    uint32_t column_bits;       // the least power of two that is not less than pitch / 8
    uint32_t packed;            // 1: the sums of a group fit 16 bits
    uint32_t whole;             // 1: one chunk, one launch
};

// A row of counters, padded so that rows are read 16 bytes at a time.
__device__ __forceinline__ uint32_t pitch_of(const OrderArguments& o) { return (o.num_local + 7) / 8 * 8; }

// Tiles of an expert that one thread of `place` writes.
constexpr uint32_t kOwnTiles = 4;

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
    const uint64_t slots = uint64_t(o.chunk_units) * o.unit_slots;
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

__device__ __forceinline__ uint32_t tiles_of(uint32_t count, uint32_t tile_rows, uint32_t tile_shift) {
    if (tile_rows == 0) return 0;
    // Not (count + tile_rows - 1) / tile_rows, which may wrap.
    return tile_shift < 32 ? (count >> tile_shift) + ((count & (tile_rows - 1)) != 0)
                           : count / tile_rows + (count % tile_rows != 0);
}

// From the slots of each expert, which `total_of` tells once, to offsets of slots and tiles; `visit` is told each expert's
// total and offsets. Returns whether an expert has more than kOwnTiles tiles. All threads call it; a barrier stands at its end.
template <typename TotalOf, typename Visit>
__device__ __forceinline__ bool scan_experts(const OrderArguments& o, const Offsets& s, TotalOf total_of, Visit visit) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t per_thread = o.num_local <= blockDim.x ? 1 : (o.num_local + blockDim.x - 1) / blockDim.x;
    const uint32_t first = min(threadIdx.x * per_thread, o.num_local);
    const uint32_t end = min(first + per_thread, o.num_local);
    const bool works = warp * 32 * per_thread < o.num_local;  // the last warps may have no expert
    uint32_t total = 0, slots = 0, tiles = 0, up_to_slots = 0, up_to_tiles = 0;
    if (works) {
        for (uint32_t e = first; e < end; ++e) {
            total = total_of(e);
            if (per_thread > 1) s.totals[e] = total;
            slots += total;
            tiles += tiles_of(total, o.tile_rows, o.tile_shift);
        }
        up_to_slots = warp_inclusive_sum(slots, lane);
        up_to_tiles = warp_inclusive_sum(tiles, lane);
        if (lane == 31) {
            s.scratch[warp] = up_to_slots;
            s.scratch[32 + warp] = up_to_tiles;
        }
    }
    __syncthreads();
    bool many = false;
    if (works) {
        slots = up_to_slots - slots + __reduce_add_sync(kAllLanes, lane < warp ? s.scratch[lane] : 0);
        tiles = up_to_tiles - tiles + __reduce_add_sync(kAllLanes, lane < warp ? s.scratch[32 + lane] : 0);
        for (uint32_t e = first; e < end; ++e) {
            if (per_thread > 1) total = s.totals[e];
            s.offsets[e] = slots;
            s.tiles[e] = tiles;
            visit(e, total, slots, tiles);
            const uint32_t own = tiles_of(total, o.tile_rows, o.tile_shift);
            many |= own > kOwnTiles;
            slots += total;
            tiles += own;
        }
        if (first < end && end == o.num_local) {
            s.offsets[end] = slots;
            s.tiles[end] = tiles;
        }
    }
    if (o.num_local == 0 && threadIdx.x == 0) s.offsets[0] = s.tiles[0] = 0;
    return __syncthreads_or(many) != 0;
}

// One of the tiles of an expert.
template <typename Arguments>
__device__ __forceinline__ void write_tile(
    const Arguments& a, uint32_t expert, uint32_t offset, uint32_t first, uint32_t tile) {
    a.tile_experts[first + tile] = expert;
    a.tile_starts[first + tile] = offset + tile * a.tile_rows;
}

// The tiles of all experts from the tile `from` of each on, a warp those of one.
template <typename Arguments>
__device__ __forceinline__ void write_tiles(
    const Arguments& a, const uint32_t* offsets, const uint32_t* tiles, uint32_t from) {
    const uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, num_warps = gridDim.x * blockDim.x / 32;
    for (uint32_t e = warp; e < a.num_local; e += num_warps) {
        const uint32_t first = tiles[e], count = tiles[e + 1] - first;
        for (uint32_t i = from + threadIdx.x % 32; i < count; i += 32) write_tile(a, e, offsets[e], first, i);
    }
}

// The tiles behind the last one.
template <typename Arguments>
__device__ __forceinline__ void clear_tiles(const Arguments& a, uint32_t num_tiles) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint64_t t = uint64_t(num_tiles) + thread; t < a.max_tiles; t += gridDim.x * blockDim.x) {
        a.tile_experts[t] = 0xffffffffu;
        a.tile_starts[t] = kNoSlot;
    }
}

// What stands behind the last offset, the last slot and the last tile.
__device__ __forceinline__ void write_ends(const OrderArguments& o, const Offsets& s) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, num_slots = s.offsets[o.num_local];
    if (thread == 0) o.expert_offsets[o.num_local] = num_slots;
    for (uint64_t i = uint64_t(num_slots) + thread; i < o.num_slots; i += gridDim.x * blockDim.x) {
        o.sorted_slots[i] = kNoSlot;
    }
    clear_tiles(o, s.tiles[o.num_local]);
}

// ------------------------------------------------------------------------------------------------------------------
// One chunk

// The shared memory of a block that counts.
struct Counters {
    uint32_t* masks;    // [W, pitch]
    uint16_t* before;   // [W, pitch]: bits of the words before
    uint16_t* experts;  // [slots of the chunk]: local experts
    uint32_t pitch;
    bool few;  // no masks

    // Sets unit `unit` of the chunk for slot `slot` of the chunk.
    __device__ __forceinline__ void mark(uint32_t unit, uint32_t slot, uint32_t expert) const {
        experts[slot] = static_cast<uint16_t>(expert);
        if (!few && expert != kNobody) atomicOr(&masks[unit / 32 * pitch + expert], 1u << unit % 32);
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

// Whether slots are so few that to look at each of them once for every expert takes less time than barriers and sums. An
// expert has one tile then, and a thread one expert.
__device__ __forceinline__ bool are_few(const OrderArguments& o) {
    const bool one_tile = o.tile_rows == 0 || o.tile_rows >= o.num_slots;
    return o.whole && o.num_slots <= 16 && o.num_local <= blockDim.x && one_tile;
}

// What follows when all of a few slots are marked and seen: lane i of each warp has slot i, and every warp counts for itself.
__device__ __forceinline__ void finish_few(const OrderArguments& o, const Counters& c) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t mine = lane < o.num_slots ? c.experts[lane] : kNobody;
    const uint32_t same = __match_any_sync(kAllLanes, mine), below = (1u << lane) - 1;
    // The first slot of each expert, which has one tile.
    const uint32_t firsts = __ballot_sync(kAllLanes, mine != kNobody && (same & below) == 0);
    const uint32_t num_slots = __popc(__ballot_sync(kAllLanes, mine != kNobody)), num_tiles = __popc(firsts);
    const uint32_t e = threadIdx.x;
    uint32_t count = 0, offset = 0, tile = 0, place = __popc(same & below);
#pragma unroll 4
    for (uint32_t i = 0; i < o.num_slots; ++i) {
        const uint32_t other = __shfl_sync(kAllLanes, mine, i);
        count += other == e;
        offset += other < e;
        tile += other < e ? firsts >> i & 1 : 0;
        place += other < mine;
    }
    if (e < o.num_local) {
        o.expert_counts[e] = count;
        o.expert_offsets[e] = offset;
        if (count > 0 && o.tile_rows > 0) write_tile(o, e, offset, tile, 0);
    }
    if (threadIdx.x < o.num_slots) {
        o.slot_rank[lane] = mine != kNobody ? place : kNoSlot;
        if (mine != kNobody) o.sorted_slots[place] = lane;
        if (lane >= num_slots) o.sorted_slots[lane] = kNoSlot;
    }
    if (threadIdx.x == 0) o.expert_offsets[o.num_local] = num_slots;
    clear_tiles(o, num_tiles);
}

// What follows when all slots are marked and seen.
__device__ __forceinline__ void finish_chunk(const OrderArguments& o, const Counters& c, uint32_t* memory) {
    const Span span = chunk_span(o, blockIdx.x);
    const auto each_slot = [&](auto write) {
        for (uint32_t i = threadIdx.x; i < span.end - span.first; i += blockDim.x) {
            const uint32_t expert = c.experts[i];
            const uint32_t unit = o.unit_slots == 1 ? i : __umulhi(i, o.unit_inverse);
            write(span.first + i, expert, expert != kNobody ? c.rank(unit, expert) : 0);
        }
    };
    if (o.whole) {
        const Offsets s(memory, c.pitch);
        const auto count = [&](uint32_t e) { return c.count(e, o.chunk_words); };
        scan_experts(o, s, count, [&](uint32_t e, uint32_t total, uint32_t offset, uint32_t tile) {
            o.expert_counts[e] = total;
            o.expert_offsets[e] = offset;
            const uint32_t tiles = tiles_of(total, o.tile_rows, o.tile_shift);
            for (uint32_t i = 0; i < tiles; ++i) write_tile(o, e, offset, tile, i);
        });
        each_slot([&](uint32_t slot, uint32_t expert, uint32_t rank) {
            const uint32_t place = expert != kNobody ? s.offsets[expert] + rank : kNoSlot;
            o.slot_rank[slot] = place;
            if (expert != kNobody) o.sorted_slots[place] = slot;
        });
        write_ends(o, s);
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
    const Counters c{memory, before, before + counters, pitch, are_few(o)};
    if (!c.few) {
        for (uint32_t i = threadIdx.x; i < counters; i += blockDim.x) c.masks[i] = 0;
        __syncthreads();
    }
    mark_all(c);
    __syncthreads();
    if (c.few) return finish_few(o, c);
    const uint32_t chunk_slots = o.chunk_units * o.unit_slots;
    finish_chunk(o, c, memory + counters + (counters + chunk_slots + 1) / 2);
}

// ------------------------------------------------------------------------------------------------------------------
// The second launch

constexpr uint32_t kPlaceThreads = 512;
// Groups of threads that add up rows: each a warp, unless a row has many columns.
constexpr int kMostGroups = 16;

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

// Sums up the rows of all chunks, and those before chunk `first`. A group of threads adds some of the rows, 8 experts a
// thread; where a row has fewer threads than a warp, a warp adds several rows at once. Both sums are left in shared memory,
// of 16 or 32 bits, [groups, pitch].
template <bool kPacked>
__device__ __forceinline__ void sum_rows(
    const OrderArguments& o, uint32_t pitch, uint32_t first, uint32_t* totals, uint32_t* befores) {
    const uint32_t columns = pitch / 8, width = 1u << o.column_bits;
    const uint32_t group_threads = kPlaceThreads >> o.group_bits, at_once = max(group_threads >> o.column_bits, 1u);
    const uint32_t thread = threadIdx.x & (group_threads - 1), group = threadIdx.x / group_threads;
    for (uint32_t column = thread & (width - 1); column < width; column += group_threads) {
        const bool in = column < columns;
        Sums<kPacked> total, before;
        const uint16_t* const at = o.chunk_counts + column * 8;
        const uint32_t first_row = (group * at_once) + (thread >> o.column_bits);
#pragma unroll 8
        for (uint32_t row = in ? first_row : o.num_chunks; row < o.num_chunks; row += at_once << o.group_bits) {
            const uint4 counts = *reinterpret_cast<const uint4*>(at + uint64_t(row) * pitch);
            total.add(counts);
            if (row < first) before.add(counts);
        }
        for (uint32_t d = width; d < 32; d *= 2) {
#pragma unroll
            for (int j = 0; j < Sums<kPacked>::kWords; ++j) {
                total.words[j] += __shfl_xor_sync(kAllLanes, total.words[j], d);
                before.words[j] += __shfl_xor_sync(kAllLanes, before.words[j], d);
            }
        }
        if (!in || (thread >> o.column_bits) > 0) continue;
        const uint32_t to = (group * columns + column) * Sums<kPacked>::kWords;
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
    const uint32_t pitch = pitch_of(o), groups = 1u << o.group_bits, sum_words = groups * pitch / 8 * Sums<kPacked>::kWords;
    uint32_t* const totals = memory;
    uint32_t* const befores = totals + sum_words;
    const Offsets s(befores + sum_words, pitch);
    uint32_t* const base = s.end();  // [pitch]: the place of the chunk's first slot of each expert
    const uint32_t first = blockIdx.x * o.chunks_per_block;
    const uint32_t end = min(first + o.chunks_per_block, o.num_chunks);

    Span span = chunk_span(o, first);
    wait_for_previous_kernel();

    // The first slots are on their way while the rows are summed up.
    uint32_t batch[kBatch];
    const auto load = [&](uint64_t from) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const uint64_t slot = from + i * blockDim.x;
            batch[i] = slot < span.end ? o.slot_rank[slot] : kNoSlot;
        }
    };
    load(uint64_t(span.first) + threadIdx.x);

    sum_rows<kPacked>(o, pitch, first, totals, befores);
    __syncthreads();
    const auto sum_of = [&](const uint32_t* sums, uint32_t e) {
        const Sum* const of_groups = reinterpret_cast<const Sum*>(sums) + e;
        uint32_t sum = 0;
        if (groups == kMostGroups) {
#pragma unroll
            for (int g = 0; g < kMostGroups; ++g) sum += of_groups[g * pitch];
        } else {
            for (uint32_t g = 0; g < groups; ++g) sum += of_groups[g * pitch];
        }
        return sum;
    };
    const auto total_of = [&](uint32_t e) {
        base[e] = sum_of(befores, e);
        return sum_of(totals, e);
    };
    const auto visit = [&](uint32_t e, uint32_t total, uint32_t offset, uint32_t tile) {
        base[e] += offset;
        // Each block writes the experts of a warp; the last block those that are left.
        if (min(e / 32, gridDim.x - 1) == blockIdx.x) {
            o.expert_counts[e] = total;
            o.expert_offsets[e] = offset;
            const uint32_t tiles = tiles_of(total, o.tile_rows, o.tile_shift);
            for (uint32_t i = 0; i < min(tiles, kOwnTiles); ++i) write_tile(o, e, offset, tile, i);
        }
    };
    const bool more_tiles = scan_experts(o, s, total_of, visit);

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
    write_ends(o, s);
    if (more_tiles) write_tiles(o, s.offsets, s.tiles, kOwnTiles);
}

}  // namespace moe
