// The experts' projections for few tokens of an expert: they stay in shared memory while the weights go past them once.
//
//     item      one band of 16 rows of one tile's expert; a block takes items side by side, a tile after the other
//     group     W warps that multiply and one that finishes; the groups of a block take its items in turn
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
// 3. `down` has its first pieces under way before the kernel in front of it has ended.
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
// Barriers: the sums of an item are there, or no longer needed; the tokens are; the input of `down` is.
constexpr uint32_t kFull = 1, kEmpty = kFull + kMaxGroups * kSums, kTokens = kEmpty + kMaxGroups * kSums, kInput = kTokens + 1;

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
template <typename Format_, typename T_, Kind kKind_, int kBlocks_>
struct Made {
    using Format = Format_;
    using T = T_;
    static constexpr Kind kKind = kKind_;
    static constexpr int kBlocks = kBlocks_;
    static constexpr uint32_t kUnits = kPieceUnits<Format>;
    static constexpr uint32_t kPiece = kPieceBytes<Format>;
    static constexpr uint32_t kColumnBytes = kUnitColumns * sizeof(T);
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
    // The threads of the group, of which all but the last 32 multiply; those of all groups that multiply.
    __device__ __forceinline__ uint32_t threads() const { return warps * 32 + 32; }
    __device__ __forceinline__ uint32_t multiplying() const { return groups * warps * 32; }
};

// A group's way through its items.
struct Walk {
    uint32_t tile, band, bands, step;
    uint32_t left;  // items of the block from here on

    // Group `group` of `groups` that take `count` items in turn; a tile has no fewer than groups.
    __device__ __forceinline__ Walk(
        uint32_t tile, uint32_t band, uint32_t count, uint32_t bands, uint32_t groups, uint32_t group)
        : tile(tile), band(band), bands(bands), step(groups), left(count) {
        skip(group);
    }
    __device__ __forceinline__ bool ends() const { return left == 0; }
    __device__ __forceinline__ void next() { skip(step); }

  private:
    __device__ __forceinline__ void skip(uint32_t items) {
        left -= min(left, items);
        band += items;
        if (band >= bands) {
            band -= bands;
            ++tile;
        }
    }
};

// The items of a block. There are fewer than 2^32: 64-bit divisions by every thread would take longer than a small batch.
struct Span {
    uint32_t count, bands;  // items; bands of a tile
    uint32_t tile, band;    // of the first item
    uint32_t last_tile;

    template <typename M>
    static __device__ __forceinline__ Span of(const ProjectionArguments& a, uint32_t num_tiles) {
        const uint32_t bands = a.out_features / (M::kKind == kGateUp ? 8 : 16);
        const uint32_t all = num_tiles * bands, each = all / gridDim.x, longer = all - each * gridDim.x;
        const uint32_t first = blockIdx.x * each + min(blockIdx.x, longer), count = each + (blockIdx.x < longer);
        const uint32_t tile = first / bands, band = first - tile * bands;
        return {count, bands, tile, band, tile + (band + max(count, 1u) - 1) / bands};
    }
    template <typename M>
    __device__ __forceinline__ Walk walk(const Place<M>& place) const {
        return Walk(tile, band, count, bands, place.groups, place.group);
    }
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

// The pieces of weights of a warp, item after item. Whole: every warp has kPieceUnits of each item, one piece.
template <typename M, bool kWhole>
struct Stream {
    using Format = typename M::Format;

    const ProjectionArguments& a;
    Walk walk;             // of the next piece
    uint32_t units;        // of a band
    uint32_t first, mine;  // of the warp's units in a band, and their number
    uint32_t tile;         // whose expert `values` points into
    uint32_t done = 0;     // units of the item before the next piece
    const unsigned char *values, *scales;  // of the next piece
    Ring<M::kPiece>& ring;

    __device__ __forceinline__ Stream(
        const ProjectionArguments& a, Walk walk, uint32_t units, uint32_t first, uint32_t mine, Ring<M::kPiece>& ring)
        : a(a), walk(walk), units(units), first(first), mine(mine), ring(ring) {
        if (mine == 0) this->walk.left = 0;
        if (!this->walk.ends()) enter_tile();
    }

    __device__ __forceinline__ void enter_tile() {
        tile = walk.tile;
        const uint64_t unit = (uint64_t(a.tile_experts[tile]) * walk.bands + walk.band) * units + first;
        values = static_cast<const unsigned char*>(a.weights) + unit * kUnitBytes<Format>;
        scales = static_cast<const unsigned char*>(a.scales) + unit * kScaleBytes;
    }

    __device__ __forceinline__ void advance(uint32_t count) {
        values += uint64_t(count) * kUnitBytes<Format>;
        if (Format::kHasScales) scales += uint64_t(count) * kScaleBytes;
    }

    // Brings the next `count` units.
    __device__ __forceinline__ void bring_units(uint32_t count) {
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

    // Puts the next piece under way, or an empty group, so that groups can be counted.
    __device__ __forceinline__ void fetch() {
        if (!walk.ends()) {
            const uint32_t count = kWhole ? M::kUnits : min(M::kUnits, mine - done);
            bring_units(count);
            ring.fill();
            if (kWhole || (done += count) == mine) {
                done = 0;
                // To the same units of the group's next item.
                advance(walk.step * units - (kWhole ? 0 : mine - count));
                walk.next();
                if (walk.tile != tile && !walk.ends()) enter_tile();
            } else {
                advance(count);
            }
        }
#ifndef MOE_HOPPER
        commit_copies();
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

    // By the lanes of one warp, for a tile that is there or behind the last.
    __device__ __forceinline__ void look_up(const ProjectionArguments& a, uint32_t tile, uint32_t last_tile) const {
        const Tile of = tile <= last_tile ? tile_of(a, tile, 8 * M::kBlocks) : Tile{};
        const uint32_t lane = threadIdx.x % 32, place = of.first + lane;
        if (lane < of.count) rows[tile % 2][lane] = M::kKind == kGateUp ? a.sorted_slots[place] / a.top_k : place;
        if (lane == 0) counts[tile % 2] = of.count;
    }

    // Copies the rows, by all warps that multiply. Columns of tokens that the tile lacks are never looked at.
    __device__ __forceinline__ void load(
        const ProjectionArguments& a, uint32_t tile, typename M::T* tokens, uint32_t pitch, uint32_t threads) const {
        const uint32_t words = a.in_features / 8;  // of 16 bytes
        const uint32_t all = counts[tile % 2] * words;
#pragma unroll 8
        for (uint32_t i = threadIdx.x; i < all; i += threads) {
            const uint32_t row = i / words, word = i - row * words;
            const uint64_t from = rows[tile % 2][row];
            const uint4* const source = static_cast<const uint4*>(a.input) + from * words;
            *reinterpret_cast<uint4*>(tokens + row * pitch + word * 8) = source[word];
        }
    }
};

// A warp that multiplies; `wait_for_input` stands in front of the first read of tokens.
template <bool kWhole, typename M, typename WaitForInput>
__device__ __forceinline__ void multiply_items(
    const ProjectionArguments& a, const Place<M>& place, const Span& span, Ring<M::kPiece>& ring, WaitForInput wait_for_input) {
    using T = typename M::T;
    using Format = typename M::Format;
    Walk walk = span.walk(place);
    const uint32_t units = a.in_features / kUnitColumns;
    const uint32_t first = units * place.warp / place.warps, mine = units * (place.warp + 1) / place.warps - first;
    __shared__ uint32_t rows[2][8 * M::kBlocks], counts[2];
    const Sources<M> sources{rows, counts};
    const bool looks_up = threadIdx.x < 32;
    if (looks_up) sources.look_up(a, span.tile, span.last_tile);
    Stream<M, kWhole> stream(a, walk, units, first, mine, ring);
    // Of gate_up one piece: what is looked up, each time with an answer to wait for, comes behind what is under way.
    constexpr int kEarly = M::kKind == kGateUp ? 1 : kPrefetched;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) stream.fetch();
    wait_for_input();

    const uint32_t row_bytes = place.pitch * sizeof(T), block_bytes = 8 * row_bytes;
    const SharedAddress tokens =
        shared_address(place.tokens) + place.lane % 8 * row_bytes + place.lane / 8 * 16 + first * M::kColumnBytes;
    const SharedAddress values = place.pieces + place.lane * 16;
    const SharedAddress scales = place.pieces + M::kUnits * kUnitBytes<Format> + place.lane / 4 * 4;
    uint32_t room = 0, items = 0;
    for (uint32_t tile = span.tile; tile <= span.last_tile; ++tile) {
        wait_at_barrier(kTokens, place.multiplying());  // nobody needs the tile before any more
        sources.load(a, tile, place.tokens, place.pitch, place.multiplying());
        if (tile == span.tile) {
#pragma unroll
            for (int i = kEarly; i < kPrefetched; ++i) stream.fetch();
        }
        if (looks_up) sources.look_up(a, tile + 1, span.last_tile);
        wait_at_barrier(kTokens, place.multiplying());
        for (; !walk.ends() && walk.tile == tile; walk.next(), ++items) {
            Accumulators<M::kBlocks> c;
            for (uint32_t done = 0; done < mine; done += M::kUnits) {
                ring.wait();
                const auto add = [&](uint32_t i) {
                    Unit<Format> unit;
                    unit.load(values + ring.taken + i * kUnitBytes<Format>, scales + ring.taken + i * kScaleBytes);
                    const Columns<M::kBlocks> columns(tokens + (done + i) * M::kColumnBytes, block_bytes);
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
            if (items >= kSums) wait_at_barrier(kEmpty + barrier, place.threads());
            float4* const sums = place.sums + room * place.sums_of_item() + place.warp * (M::kBlocks * 32);
#pragma unroll
            for (int i = 0; i < M::kBlocks; ++i) {
                sums[i * 32] = make_float4(c.sums[i][0], c.sums[i][1], c.sums[i][2], c.sums[i][3]);
            }
            pass_barrier(kFull + barrier, place.threads());
            room = room + 1 == kSums ? 0 : room + 1;
        }
    }
}

// Writes the results of rows g and g + 8 of a band for tokens 2t and 2t + 1 of a block of 8.
template <typename T, Kind kKind>
__device__ __forceinline__ void write_results(
    const ProjectionArguments& a, const Tile& tile, uint32_t band, uint32_t block, const float (&c)[4]) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t token = block * 8 + 2 * t + i;
        if (token >= tile.count) break;
        const uint64_t to = uint64_t(tile.first + token) * a.out_features;
        if constexpr (kKind == kGateUp) {
            keep(static_cast<T*>(a.output) + to + band * 8 + g, activate(a, c[i], c[2 + i]));
        } else {
            keep_both(static_cast<float*>(a.output) + to + band * kBandRows + 2 * g, c[i], c[2 + i]);
        }
    }
}

// The bias of rows g and g + 8 of a band.
template <Kind kKind>
struct Bias {
    float of[2] = {};

    __device__ __forceinline__ Bias(const ProjectionArguments& a, uint32_t expert, uint32_t band) {
        if (a.bias == nullptr) return;
        const uint32_t rows = kKind == kGateUp ? 2 * a.out_features : a.out_features;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t row = published_row(kKind, a.gate_up_rows, rows, band, threadIdx.x % 32 / 4 + 8 * i);
            of[i] = a.bias[uint64_t(expert) * rows + row];
        }
    }
};

// A warp that finishes.
template <typename M>
__device__ __forceinline__ void finish_items(const ProjectionArguments& a, const Place<M>& place, const Span& span) {
    Walk walk = span.walk(place);
    if (walk.ends()) return;
    Tile tile = tile_of(a, walk.tile, 8 * M::kBlocks);
    Bias<M::kKind> bias(a, tile.expert, walk.band);
    for (uint32_t room = 0; !walk.ends();) {
        // What the next item needs is on its way before this one is waited for.
        Walk next = walk;
        next.next();
        const Tile next_tile = next.ends() || next.tile == walk.tile ? tile : tile_of(a, next.tile, 8 * M::kBlocks);
        const Bias<M::kKind> next_bias = next.ends() ? bias : Bias<M::kKind>(a, next_tile.expert, next.band);
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
        if (walk.left > kSums * walk.step) pass_barrier(kEmpty + barrier, place.threads());
#pragma unroll
        for (int i = 0; i < M::kBlocks; ++i) {
            const float results[4] = {c[i].x + bias.of[0], c[i].y + bias.of[0], c[i].z + bias.of[1], c[i].w + bias.of[1]};
            write_results<typename M::T, M::kKind>(a, tile, walk.band, i, results);
        }
        room = room + 1 == kSums ? 0 : room + 1;
        walk = next;
        tile = next_tile;
        bias = next_bias;
    }
}

// A warp's part of a projection.
template <typename M, typename WaitForInput>
__device__ __forceinline__ void project_span(
    const ProjectionArguments& a, const Place<M>& place, const Span& span, Ring<M::kPiece>& ring, WaitForInput wait_for_input) {
    if (place.warp == place.warps) {
        finish_items(a, place, span);
    } else if (a.in_features == place.warps * M::kUnits * kUnitColumns) {
        multiply_items<true>(a, place, span, ring, wait_for_input);
    } else {
        multiply_items<false>(a, place, span, ring, wait_for_input);
    }
}

template <typename M>
__device__ __forceinline__ void project_resident(const ProjectionArguments& a) {
    MOE_DYNAMIC_SHARED(unsigned char, memory);
    // `down` may begin when gate_up allows it, and the order is there then: gate_up has waited for it before.
    if (M::kKind == kGateUp) wait_for_previous_kernel();
    allow_next_kernel();
    const Span span = Span::of<M>(a, count_tiles(a));
    if (span.count == 0) return;
    const Place<M> place(memory, a);
    Ring<M::kPiece> ring(place.pieces);
    project_span(a, place, span, ring, [] {
        if (M::kKind == kDown) wait_for_previous_kernel();
    });
}

// ------------------------------------------------------------------------------------------------------------------
// Both projections in one launch, for a handful of tokens: what a launch costs, `down` has instead under way from the first
// pieces of its weights on.

// Where all finishing warps of the grid meet, whose blocks are all there (a cooperative launch): what they wrote before is
// seen by all blocks after.
struct Meeting {
    uint32_t* come;   // warps that have
    uint32_t* times;  // how often all have
    uint32_t before;  // how often all had met when this warp came to the kernel

    __device__ __forceinline__ explicit Meeting(uint32_t* at) : come(at), times(at + 1), before(load_acquire(times)) {}

    __device__ __forceinline__ void wait(uint32_t num_warps) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            if (add_and_see(come) + 1 == num_warps) {
                *come = 0;
                add_release(times);
            } else {
                while (load_acquire(times) == before) {
                }
            }
        }
        __syncwarp();
    }
};

template <typename Format, typename T, int kBlocks>
__device__ __forceinline__ void run_layer(const LayerArguments& a) {
    using GateUp = Made<Format, T, kGateUp, kBlocks>;
    using Down = Made<Format, T, kDown, kBlocks>;
    MOE_DYNAMIC_SHARED(unsigned char, memory);
    const Place<GateUp> of_gate_up(memory, a.gate_up);
    const Place<Down> of_down(memory, a.down);
    Ring<Down::kPiece> ring(of_down.pieces);
    allow_next_kernel();
    wait_for_previous_kernel();
    const uint32_t num_tiles = count_tiles(a.gate_up);
    const Span gate_up = Span::of<GateUp>(a.gate_up, num_tiles), down = Span::of<Down>(a.down, num_tiles);
    if (of_down.warp == of_down.warps) {
        const Meeting meeting(a.signals);
        if (gate_up.count > 0) finish_items(a.gate_up, of_gate_up, gate_up);
        meeting.wait(gridDim.x * of_down.groups);
        pass_barrier(kInput, blockDim.x);
        if (down.count > 0) finish_items(a.down, of_down, down);
    } else {
        if (gate_up.count > 0) project_span(a.gate_up, of_gate_up, gate_up, ring, [] {});
        const auto wait_for_input = [] { wait_at_barrier(kInput, blockDim.x); };
        if (down.count > 0) {
            project_span(a.down, of_down, down, ring, wait_for_input);
        } else {
            wait_for_input();
        }
    }
}

}  // namespace moe
