// Both projections of a layer for few tokens of an expert, in one launch: tokens stay in shared memory while the weights go past
// them once.
//
//     item      one band of 16 rows of one tile's expert
//     stripe    as many items side by side as a block has groups; of all stripes, those of gate_up and then those of down, a tile
//               after the other, a block takes every gridDim.x-th
//     group     W warps that multiply and one that finishes; each has an item of the block's stripe
//     warp w    of those that multiply has the units U w / W .. U (w + 1) / W of its group's items
//     finisher  adds up what the W warps have for an item, in their order; bias, activation, rounding
//
// Made for m16n8k16 with the weights as its rows, so that 8 tokens fill it. Why it is fast: what limits is how fast weights
// come from memory.
//
// 1. Every byte of them is read once, side by side and in fragment order (experts/fragments.cuh), 16 bytes a lane.
// 2. A warp has pieces of the coming items under way at any time, whatever the others do: sums are handed over through
//    kSums rooms, so that no warp that multiplies waits for one that finishes. At compute capability 9.0 the copy engine
//    brings them: a warp that copies by itself stands still while more is under way than its multiprocessor can count.
// 3. All blocks work on the same few tiles, and nothing drains between the projections: when a block comes to a tile of `down`,
//    whose h all blocks have made and a number counts, it has long been there, and its weights are under way.
// 4. Few instructions for each weight, since at full speed a multiprocessor has 40 cycles for a unit and four schedulers:
//    a scale is multiplied in together with the 2^126 that raw operands lack.
//
// Wide scales (and half) instead scale the sums of 32 columns in float32, which any power of two allows.
#pragma once

#include <type_traits>

#include "common/hopper.cuh"
#include "common/signals.cuh"
#include "experts/fragments.cuh"

namespace moe {

// Pieces of weights that a warp has room for, and units of a piece.
constexpr int kSlots = 3;
// Pieces that are under way before the first one is taken: where threads copy, the slot of the one that is taken stays out.
#ifdef MOE_HOPPER
constexpr int kPrefetched = kSlots;
#else
constexpr int kPrefetched = kSlots - 1;
#endif
template <typename Format> constexpr uint32_t kPieceUnits = Format::kWords == 1 ? 3 : 1;
template <typename Format> constexpr uint32_t kUnitBytes = Format::kWords * 512;
constexpr uint32_t kScaleBytes = 32;  // of a unit
// Bytes of a piece: values, then scales.
template <typename Format>
constexpr uint32_t kPieceBytes = kPieceUnits<Format> * (kUnitBytes<Format> + (Format::kHasScales ? kScaleBytes : 0));

// Groups of a block, at most, and items of a group whose sums have room.
constexpr uint32_t kMaxGroups = 2, kSums = 2;
// Barriers: the sums of an item are there, or no longer needed; the tokens are.
constexpr uint32_t kFull = 1, kEmpty = kFull + kMaxGroups * kSums, kTokens = kEmpty + kMaxGroups * kSums;

// How MXFP4 is scaled: the weights, or the sums of 32 columns.
template <bool kWide> struct Scaled : MxFp4 {
    static constexpr bool kScalesSums = kWide;
};
using Narrow4 = Scaled<false>;
using Wide4 = Scaled<true>;

// The A operands of a step of MXFP4, without scales: 2^-126 of the value in bfloat16, 2^-14 in half.
template <typename T> __device__ __forceinline__ void raw_operands(uint32_t word, uint32_t (&a)[4]);
template <> __device__ __forceinline__ void raw_operands<__nv_bfloat16>(uint32_t word, uint32_t (&a)[4]) {
    MxFp4::raw_operands(word, a);
}
template <> __device__ __forceinline__ void raw_operands<__half>(uint32_t word, uint32_t (&a)[4]) {
    MxFp4::raw_operands(word, a);
    // A half has its exponent three bits further up.
#pragma unroll
    for (int p = 0; p < 4; ++p) a[p] = (a[p] & 0x80008000u) | (a[p] & 0x01c001c0u) << 3;
}

template <int kBlocks>
struct Accumulators {
    float sums[kBlocks][4] = {};
};

// What a kernel is made for.
template <typename Format_, typename T_, int kBlocks_>
struct Made {
    using Format = Format_;
    using T = T_;
    static constexpr int kBlocks = kBlocks_;
    static constexpr uint32_t kUnits = kPieceUnits<Format>;
    static constexpr uint32_t kPiece = kPieceBytes<Format>;
    static constexpr uint32_t kColumnBytes = kUnitColumns * sizeof(T);
};

// A stripe that a block has.
struct Turn {
    uint32_t tile, stripe, is_down;
};

// The stripes of a block.
template <typename M>
struct Turns {
    const LayerArguments& a;
    const uint32_t groups;
    uint32_t num_tiles;
    uint32_t stripes[2];  // of a tile, by is_down
    uint32_t skipped_tiles[2], skipped_stripes[2];  // what gridDim.x stripes are

    __device__ __forceinline__ Turns(const LayerArguments& a, uint32_t groups) : a(a), groups(groups), num_tiles(0) {
#pragma unroll
        for (uint32_t is_down = 0; is_down < 2; ++is_down) {
            stripes[is_down] = (bands(is_down) + groups - 1) / groups;
            skipped_tiles[is_down] = gridDim.x / stripes[is_down];
            skipped_stripes[is_down] = gridDim.x - skipped_tiles[is_down] * stripes[is_down];
        }
    }
    __device__ __forceinline__ const ProjectionArguments& of(uint32_t is_down) const { return is_down ? a.down : a.gate_up; }
    // Of a tile.
    __device__ __forceinline__ uint32_t bands(uint32_t is_down) const {
        return is_down ? a.down.out_features / kBandRows : a.gate_up.out_features / (kBandRows / 2);
    }
    // Of gate_up, if there are so many.
    __device__ __forceinline__ Turn number(uint32_t number) const {
        const uint32_t tile = number / stripes[0];
        return {tile, number - tile * stripes[0], 0};
    }
    __device__ __forceinline__ Turn first() const { return in_projection(number(blockIdx.x)); }
    __device__ __forceinline__ Turn after(Turn turn) const {
        turn.tile += turn.is_down ? skipped_tiles[1] : skipped_tiles[0];
        turn.stripe += turn.is_down ? skipped_stripes[1] : skipped_stripes[0];
        const uint32_t all = turn.is_down ? stripes[1] : stripes[0];
        if (turn.stripe >= all) {
            turn.stripe -= all;
            ++turn.tile;
        }
        return in_projection(turn);
    }
    __device__ __forceinline__ bool ends(const Turn& turn) const { return turn.tile >= num_tiles; }
    __device__ __forceinline__ bool same_tile(const Turn& one, const Turn& other) const {
        return one.tile == other.tile && one.is_down == other.is_down;
    }

  private:
    // Stripes behind those of gate_up are those of down.
    __device__ __forceinline__ Turn in_projection(Turn turn) const {
        if (turn.is_down || turn.tile < num_tiles) return turn;
        const uint32_t number = (turn.tile - num_tiles) * stripes[0] + turn.stripe, tile = number / stripes[1];
        return {tile, number - tile * stripes[1], 1};
    }
};

// What a warp is in its block, and the block's shared memory; src/experts/cuda/path.rs reserves it.
template <typename M>
struct Place {
    using T = typename M::T;
    uint32_t lane, warps, groups;  // warps of a group that multiply
    uint32_t group, warp;          // `warp` is `warps` for the one that finishes
    T* tokens;                     // [8 kBlocks, pitch]
    uint32_t pitch;        // a row is 16 bytes longer than it must be, so that the 8 rows of a matrix lie in different banks
    float4* sums;          // of this lane, of the group's [kSums, warps, kBlocks, 32 lanes]
    SharedAddress pieces;  // of this warp, [kSlots] pieces

    __device__ __forceinline__ Place(unsigned char* memory, const ProjectionArguments& a)
        : lane(threadIdx.x % 32), warps(a.warps), groups(blockDim.x / 32 / (a.warps + 1)), pitch(a.token_features + 8) {
        const uint32_t of_block = threadIdx.x / 32, multiplying = groups * warps;
        group = of_block < multiplying ? of_block / warps : of_block - multiplying;
        warp = of_block < multiplying ? of_block % warps : warps;
        tokens = reinterpret_cast<T*>(memory);
        float4* const all = reinterpret_cast<float4*>(memory + 8 * M::kBlocks * pitch * sizeof(T));
        sums = all + group * (kSums * sums_of_item()) + lane;
        pieces = shared_address(all + groups * (kSums * sums_of_item())) + of_block * (kSlots * M::kPiece);
    }
    __device__ __forceinline__ uint32_t sums_of_item() const { return warps * M::kBlocks * 32; }
    // The group's band of a stripe, if there is one.
    __device__ __forceinline__ uint32_t band_of(const Turn& turn) const { return turn.stripe * groups + group; }
    __device__ __forceinline__ bool has_item(const Turns<M>& turns, const Turn& turn) const {
        return band_of(turn) < turns.bands(turn.is_down);
    }
    // The threads of the group, of which all but the last 32 multiply; those of all groups that multiply.
    __device__ __forceinline__ uint32_t threads() const { return warps * 32 + 32; }
    __device__ __forceinline__ uint32_t multiplying() const { return groups * warps * 32; }
};

// The slots of a warp, which pieces of kPiece bytes go round.
template <uint32_t kPiece>
struct Ring {
    SharedAddress slots;
    uint32_t filled = 0, taken = 0;  // bytes before the slot that is the next to be filled, or taken
#ifdef MOE_HOPPER
    SharedAddress barriers;  // [kSlots], each a phase for every piece
    uint32_t parity = 0;     // of the pieces that are taken

    __device__ __forceinline__ explicit Ring(SharedAddress slots) : slots(slots) {
        __shared__ uint64_t all[32][kSlots];
        barriers = shared_address(all[threadIdx.x / 32]);
        if (threadIdx.x % 32 == 0) {
            for (int i = 0; i < kSlots; ++i) start_barrier(barriers + i * kBarrierBytes, 1);
            show_barriers();
        }
        __syncwarp();
    }
    __device__ __forceinline__ SharedAddress barrier_of(uint32_t bytes) const {
        return barriers + bytes / kPiece * kBarrierBytes;
    }
    // All lanes may look at the piece.
    __device__ __forceinline__ void wait() const { wait_for_phase(barrier_of(taken), parity); }
#else
    __device__ __forceinline__ explicit Ring(SharedAddress slots) : slots(slots) {}
    __device__ __forceinline__ void wait() const {
        wait_for_copies<kSlots - 2>();
        __syncwarp();  // scales were copied by other lanes
    }
#endif
    // No lane needs the piece any more.
    __device__ __forceinline__ void take() {
        __syncwarp();
        const bool last = taken == (kSlots - 1) * kPiece;
        taken = last ? 0 : taken + kPiece;
#ifdef MOE_HOPPER
        parity ^= last;
#endif
    }
    __device__ __forceinline__ void fill() { filled = filled == (kSlots - 1) * kPiece ? 0 : filled + kPiece; }
};

// The units of a band that a warp has.
struct Units {
    uint32_t first, count;

    __device__ __forceinline__ Units(const ProjectionArguments& a, uint32_t warp, uint32_t warps) {
        const uint32_t units = a.in_features / kUnitColumns;
        first = units * warp / warps;
        count = units * (warp + 1) / warps - first;
    }
};
struct UnitsOfWarp {
    Units gate_up, down;

    __device__ __forceinline__ uint32_t first(uint32_t is_down) const { return is_down ? down.first : gate_up.first; }
    __device__ __forceinline__ uint32_t count(uint32_t is_down) const { return is_down ? down.count : gate_up.count; }
};

// The pieces of weights of a warp, item after item. Whole: every warp has kPieceUnits of each item, one piece.
template <typename M, bool kWhole>
struct Stream {
    using Format = typename M::Format;

    const Turns<M>& turns;
    const Place<M>& place;
    const UnitsOfWarp& units_of_warp;  // of the warp
    Ring<M::kPiece>& ring;
    Turn turn;           // of the next piece
    uint32_t expert;     // of its tile
    uint32_t done = 0;   // units of the item before the next piece

    __device__ __forceinline__ Stream(
        const Turns<M>& turns, const Place<M>& place, const UnitsOfWarp& units_of_warp, Ring<M::kPiece>& ring)
        : turns(turns), place(place), units_of_warp(units_of_warp), ring(ring) {}

    // Where the number of tiles is known, puts the first piece under way; where it is not, does that for a tile that is there,
    // and go_on() follows.
    __device__ __forceinline__ void start(Turn first) {
        turn = first;
        go_on();
        fetch();
    }
    __device__ __forceinline__ void start_early(Turn first) {
        turn = first;
        if (has_piece()) {
            expert = turns.a.gate_up.tile_experts[turn.tile];
            bring_next();
        }
        close_group();
    }

    // To the next piece that there is.
    __device__ __forceinline__ void go_on() {
        if (turns.ends(turn)) return;
        if (done == mine()) {
            done = 0;
            turn = turns.after(turn);
        }
        while (!turns.ends(turn) && !has_piece()) turn = turns.after(turn);
        if (!turns.ends(turn)) expert = turns.a.gate_up.tile_experts[turn.tile];
    }

    // Puts the next piece under way, or an empty group, so that groups can be counted.
    __device__ __forceinline__ void fetch() {
        if (!turns.ends(turn)) {
            bring_next();
            go_on();
        }
        close_group();
    }

  private:
    __device__ __forceinline__ uint32_t mine() const { return kWhole ? M::kUnits : units_of_warp.count(turn.is_down); }
    // There may be no item for the group, or none of its units for the warp.
    __device__ __forceinline__ bool has_piece() const { return mine() > 0 && place.has_item(turns, turn); }

    __device__ __forceinline__ void bring_next() {
        const uint32_t count = min(M::kUnits, mine() - done);
        bring_units(count);
        ring.fill();
        done += count;
    }

    __device__ __forceinline__ void close_group() {
#ifndef MOE_HOPPER
        commit_copies();
#endif
    }

    // Brings the next `count` units.
    __device__ __forceinline__ void bring_units(uint32_t count) {
        const ProjectionArguments& a = turns.of(turn.is_down);
        const uint32_t units = a.in_features / kUnitColumns, band = place.band_of(turn);
        const uint64_t unit = (uint64_t(expert) * turns.bands(turn.is_down) + band) * units + units_of_warp.first(turn.is_down) + done;
        const unsigned char* const values = static_cast<const unsigned char*>(a.weights) + unit * kUnitBytes<Format>;
        const unsigned char* const scales = static_cast<const unsigned char*>(a.scales) + unit * kScaleBytes;
        const SharedAddress to = ring.slots + ring.filled, to_scales = to + M::kUnits * kUnitBytes<Format>;
#ifdef MOE_HOPPER
        if (threadIdx.x % 32 == 0) {
            const uint32_t scale_bytes = Format::kHasScales ? count * kScaleBytes : 0;
            bring(to, values, count * kUnitBytes<Format>, to_scales, scales, scale_bytes, ring.barrier_of(ring.filled));
        }
#else
        const uint32_t part = threadIdx.x % 32 * 16;
#pragma unroll
        for (uint32_t i = 0; i < M::kUnits * Format::kWords; ++i) {
            if (kWhole || i < count * Format::kWords) copy_16(to + i * 512 + part, values + i * 512 + part);
        }
        if (Format::kHasScales && part < count * kScaleBytes) copy_16(to_scales + part, scales + part);
#endif
    }
};

// A lane's part of a unit, as it was copied.
template <typename Format>
struct Unit {
    uint4 words[Format::kWords];
    uint32_t scale;

    __device__ __forceinline__ void load(SharedAddress values, SharedAddress scales) {
#pragma unroll
        for (int i = 0; i < Format::kWords; ++i) words[i] = load_shared_16(values + i * 512);
        if (Format::kHasScales) scale = load_shared_4(scales);
    }
};

template <typename Format, typename T>
__device__ __forceinline__ void decode_unit(const Unit<Format>& unit, uint32_t (&a)[kSteps][4]) {
    if constexpr (Format::kHasScales) {
        raw_operands<T>(unit.words[0].x, a[0]);
        raw_operands<T>(unit.words[0].y, a[1]);
        raw_operands<T>(unit.words[0].z, a[2]);
        raw_operands<T>(unit.words[0].w, a[3]);
        if constexpr (std::is_same_v<T, __half>) return;
        uint32_t factors[2] = {kPairOf126, kPairOf126};
        if constexpr (!Format::kScalesSums) factors_of_scales(unit.scale, factors);
        scale_operands<0>(a[0], factors);
        scale_operands<1>(a[1], factors);
        scale_operands<2>(a[2], factors);
        scale_operands<3>(a[3], factors);
    } else {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            a[s][0] = unit.words[s].x, a[s][1] = unit.words[s].y, a[s][2] = unit.words[s].z, a[s][3] = unit.words[s].w;
        }
    }
}

// B operands of a unit's steps, two steps to four registers.
template <int kBlocks>
struct Columns {
    uint32_t b[kBlocks][2][4];

    // `tokens` is this lane's row of the matrices.
    __device__ __forceinline__ Columns(SharedAddress tokens, uint32_t block_bytes) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            load_matrices(b[block][0], tokens + block * block_bytes);
            load_matrices(b[block][1], tokens + block * block_bytes + 64);
        }
    }
};

// Adds the products of a unit.
template <typename Format, typename T, int kBlocks>
__device__ __forceinline__ void add_unit(
    const Unit<Format>& unit, const Columns<kBlocks>& columns, Accumulators<kBlocks>& c) {
    uint32_t a[kSteps][4];
    decode_unit<Format, T>(unit, a);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        const auto multiply = [&](int s, float(&sums)[4]) {
            const uint32_t(&b)[4] = columns.b[block][s / 2];
            mma_16x8x16<T>(sums, a[s], {b[s % 2 * 2], b[s % 2 * 2 + 1]});
        };
        if constexpr (Format::kScalesSums) {
            float parts[2][4] = {};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) multiply(s, parts[s / 2]);
            constexpr float kLacking = std::is_same_v<T, __half> ? 16384.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float power = power_of_scale(unit.scale >> (i / 4 * 16 + i % 4 / 2 * 8) & 0xffu);
                c.sums[block][i % 4] = fmaf(power, parts[i / 4][i % 4] * kLacking, c.sums[block][i % 4]);
            }
        } else {
#pragma unroll
            for (int s = 0; s < kSteps; ++s) multiply(s, c.sums[block]);
        }
    }
}

// The tokens of a tile: which rows of the input they are is looked up one tile ahead, since each look-up waits for the one
// before it.
template <typename M>
struct Sources {
    uint32_t (&rows)[2][8 * M::kBlocks];
    uint32_t (&counts)[2];

    // By the lanes of one warp, for a tile that is there.
    __device__ __forceinline__ void look_up(const ProjectionArguments& a, const Turn& turn, uint32_t room) const {
        const uint32_t lane = threadIdx.x % 32, first = a.tile_starts[turn.tile], place = first + lane;
        const uint32_t expert = a.tile_experts[turn.tile];
        uint32_t row = place;
        // Before it is known how many there are.
        if (!turn.is_down && lane < 8 * M::kBlocks) row = a.sorted_slots[min(place, a.num_rows - 1)] / a.top_k;
        const uint32_t count = min(8u * M::kBlocks, a.expert_offsets[expert + 1] - first);
        if (lane < count) rows[room][lane] = row;
        if (lane == 0) counts[room] = count;
    }

    // Copies the rows, by all warps that multiply. Columns of tokens that the tile lacks are never looked at.
    __device__ __forceinline__ void load(
        const ProjectionArguments& a, uint32_t room, typename M::T* tokens, uint32_t pitch, uint32_t threads) const {
        const uint32_t words = a.in_features / 8;  // of 16 bytes
        const uint32_t all = counts[room] * words;
#pragma unroll 8
        for (uint32_t i = threadIdx.x; i < all; i += threads) {
            const uint32_t row = i / words, word = i - row * words;
            const uint64_t from = rows[room][row];
            const uint4* const source = static_cast<const uint4*>(a.input) + from * words;
            *reinterpret_cast<uint4*>(tokens + row * pitch + word * 8) = source[word];
        }
    }
};

// Waits until all of a tile's h is there.
__device__ __forceinline__ void wait_for_tile(const LayerArguments& a, uint32_t tile, uint32_t items) {
    while (load_acquire(done_of(a, tile)) < items) {
    }
}

// A warp that multiplies. All threads of the block call it or finish_items; they meet once, to count the tiles.
template <bool kWhole, typename M>
__device__ __forceinline__ void multiply_items(
    const LayerArguments& a, const Place<M>& place, Turns<M>& turns, const UnitsOfWarp& units_of_warp, Ring<M::kPiece>& ring) {
    using T = typename M::T;
    using Format = typename M::Format;
    __shared__ uint32_t rows[2][8 * M::kBlocks], counts[2];
    const Sources<M> sources{rows, counts};
    const bool looks_up = threadIdx.x < 32;
    Stream<M, kWhole> stream(turns, place, units_of_warp, ring);

    // What is sought in memory, each time with an answer to wait for, stands before all weights but the first piece; the tile
    // is known without the number of tiles, if it is there.
    Turn turn = turns.number(blockIdx.x);
    const bool is_early = turn.tile < a.gate_up.max_tiles && a.gate_up.tile_experts[turn.tile] != kNothing;
    if (is_early) {
        stream.start_early(turn);
        if (looks_up) sources.look_up(a.gate_up, turn, 0);
    }
    turns.num_tiles = count_tiles(a.gate_up);
    if (is_early) {
        stream.go_on();
    } else {
        turn = turns.first();
        if (turns.ends(turn)) return;
        stream.start(turn);
        if (looks_up) sources.look_up(turns.of(turn.is_down), turn, 0);
    }

    const uint32_t row_bytes = place.pitch * sizeof(T), block_bytes = 8 * row_bytes;
    const SharedAddress tokens = shared_address(place.tokens) + place.lane % 8 * row_bytes + place.lane / 8 * 16;
    const SharedAddress values = place.pieces + place.lane * 16;
    const SharedAddress scales = place.pieces + M::kUnits * kUnitBytes<Format> + place.lane / 4 * 4;
    Turn loaded = {kNothing, 0, 0};
    for (uint32_t visits = 0, room = 0, items = 0; !turns.ends(turn); turn = turns.after(turn)) {
        if (!turns.same_tile(turn, loaded)) {
            if (turn.is_down && threadIdx.x == 0) wait_for_tile(a, turn.tile, turns.bands(0));
            wait_at_barrier(kTokens, place.multiplying());  // nobody needs the tile before any more
            sources.load(turns.of(turn.is_down), visits % 2, place.tokens, place.pitch, place.multiplying());
            if (visits == 0) {
#pragma unroll
                for (int i = 1; i < kPrefetched; ++i) stream.fetch();
            }
            ++visits;
            loaded = turn;
            if (looks_up) {
                Turn next = turns.after(turn);
                while (!turns.ends(next) && turns.same_tile(next, turn)) next = turns.after(next);
                if (!turns.ends(next)) sources.look_up(turns.of(next.is_down), next, visits % 2);
            }
            wait_at_barrier(kTokens, place.multiplying());
        }
        if (!place.has_item(turns, turn)) continue;
        const uint32_t mine = kWhole ? M::kUnits : units_of_warp.count(turn.is_down);
        const SharedAddress columns_of_part = tokens + units_of_warp.first(turn.is_down) * M::kColumnBytes;
        Accumulators<M::kBlocks> c;
        for (uint32_t done = 0; done < mine; done += M::kUnits) {
            ring.wait();
            const auto add = [&](uint32_t i) {
                Unit<Format> unit;
                unit.load(values + ring.taken + i * kUnitBytes<Format>, scales + ring.taken + i * kScaleBytes);
                const Columns<M::kBlocks> columns(columns_of_part + (done + i) * M::kColumnBytes, block_bytes);
                add_unit<Format, T>(unit, columns, c);
            };
            if (kWhole || mine - done >= M::kUnits) {
#pragma unroll
                for (uint32_t i = 0; i < M::kUnits; ++i) add(i);
            } else {
#pragma unroll 1
                for (uint32_t i = 0; i < mine - done; ++i) add(i);
            }
            ring.take();
            stream.fetch();
            if (kWhole) break;
        }
        const uint32_t barrier = place.group * kSums + room;
        if (items++ >= kSums) wait_at_barrier(kEmpty + barrier, place.threads());
        float4* const sums = place.sums + room * place.sums_of_item() + place.warp * (M::kBlocks * 32);
#pragma unroll
        for (int i = 0; i < M::kBlocks; ++i) {
            sums[i * 32] = make_float4(c.sums[i][0], c.sums[i][1], c.sums[i][2], c.sums[i][3]);
        }
        pass_barrier(kFull + barrier, place.threads());
        room = room + 1 == kSums ? 0 : room + 1;
    }
}

// Writes the results of rows g and g + 8 of a band for tokens 2t and 2t + 1 of a block of 8.
template <typename T>
__device__ __forceinline__ void write_results(
    const ProjectionArguments& a, const Tile& tile, uint32_t is_down, uint32_t band, uint32_t block, const float (&c)[4]) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t token = block * 8 + 2 * t + i;
        if (token >= tile.count) break;
        const uint64_t to = uint64_t(tile.first + token) * a.out_features;
        if (!is_down) {
            keep(static_cast<T*>(a.output) + to + band * 8 + g, activate(a, c[i], c[2 + i]));
        } else {
            keep_both(static_cast<float*>(a.output) + to + band * kBandRows + 2 * g, c[i], c[2 + i]);
        }
    }
}

// The bias of rows g and g + 8 of a band.
struct Bias {
    float of[2] = {};

    __device__ __forceinline__ Bias(const ProjectionArguments& a, uint32_t is_down, uint32_t expert, uint32_t band) {
        if (a.bias == nullptr) return;
        const Kind kind = is_down ? kDown : kGateUp;
        const uint32_t rows = is_down ? a.out_features : 2 * a.out_features;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t row = published_row(kind, a.gate_up_rows, rows, band, threadIdx.x % 32 / 4 + 8 * i);
            of[i] = a.bias[uint64_t(expert) * rows + row];
        }
    }
};

// A warp that finishes.
template <typename M>
__device__ __forceinline__ void finish_items(const LayerArguments& a, const Place<M>& place, Turns<M>& turns) {
    turns.num_tiles = count_tiles(a.gate_up);
    const auto item_from = [&](Turn turn) {
        while (!turns.ends(turn) && !place.has_item(turns, turn)) turn = turns.after(turn);
        return turn;
    };
    Turn turn = item_from(turns.first());
    if (turns.ends(turn)) return;
    Tile tile = tile_of(a.gate_up, turn.tile, 8 * M::kBlocks);
    Bias bias(turns.of(turn.is_down), turn.is_down, tile.expert, place.band_of(turn));
    for (uint32_t room = 0, items = 0;; ++items) {
        // What the next item needs is on its way before this one is waited for.
        const Turn next = item_from(turns.after(turn));
        const bool is_last = turns.ends(next);
        const Tile next_tile = is_last ? tile : tile_of(a.gate_up, next.tile, 8 * M::kBlocks);
        const Bias next_bias =
            is_last ? bias : Bias(turns.of(next.is_down), next.is_down, next_tile.expert, place.band_of(next));
        const uint32_t barrier = place.group * kSums + room;
        wait_at_barrier(kFull + barrier, place.threads());
        float4 c[M::kBlocks] = {};
        const float4* const sums = place.sums + room * place.sums_of_item();
#pragma unroll 4
        for (uint32_t w = 0; w < place.warps; ++w) {
#pragma unroll
            for (int i = 0; i < M::kBlocks; ++i) {
                const float4 more = sums[(w * M::kBlocks + i) * 32];
                c[i].x += more.x, c[i].y += more.y, c[i].z += more.z, c[i].w += more.w;
            }
        }
        // Those that multiply wait for it from the item after the next on.
        if (!is_last && !turns.ends(item_from(turns.after(next)))) pass_barrier(kEmpty + barrier, place.threads());
        const uint32_t band = place.band_of(turn);
#pragma unroll
        for (int i = 0; i < M::kBlocks; ++i) {
            const float results[4] = {c[i].x + bias.of[0], c[i].y + bias.of[0], c[i].z + bias.of[1], c[i].w + bias.of[1]};
            write_results<typename M::T>(turns.of(turn.is_down), tile, turn.is_down, band, i, results);
        }
        __syncwarp();
        if (place.lane == 0) {
            if (!turn.is_down) {
                add_release(done_of(a, turn.tile));
            } else if (atomicAdd(seen_of(a, turn.tile), 1u) + 1 == turns.bands(1)) {
                // Nobody looks at the tile's numbers any more: as they were.
                *done_of(a, turn.tile) = *seen_of(a, turn.tile) = 0;
            }
        }
        if (is_last) return;
        room = room + 1 == kSums ? 0 : room + 1;
        turn = next;
        tile = next_tile;
        bias = next_bias;
    }
}

template <typename M>
__device__ __forceinline__ void run_layer(const LayerArguments& a) {
    static_assert(kSums == 2, "finish_items looks as many items ahead");
    MOE_DYNAMIC_SHARED(unsigned char, memory);
    const Place<M> place(memory, a.gate_up);
    Ring<M::kPiece> ring(place.pieces);
    Turns<M> turns(a, place.groups);
    const UnitsOfWarp units_of_warp = {{a.gate_up, place.warp, place.warps}, {a.down, place.warp, place.warps}};
    allow_next_kernel();
    wait_for_previous_kernel();
    const uint32_t whole = place.warps * M::kUnits * kUnitColumns;
    if (place.warp == place.warps) {
        finish_items(a, place, turns);
    } else if (a.gate_up.in_features == whole && a.down.in_features == whole) {
        multiply_items<true>(a, place, turns, units_of_warp, ring);
    } else {
        multiply_items<false>(a, place, turns, units_of_warp, ring);
    }
}

}  // namespace moe
