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
// 1. Every byte of them is read once, 16 bytes a lane and side by side, and straight from the fragment order
//    (experts/fragments.cuh): a lane decodes what it has copied itself.
// 2. A warp has pieces of the coming items under way at any time, whatever the others do: sums are handed over through
//    kSums rooms, so that no warp that multiplies waits for one that finishes.
// 3. `down` has its first pieces under way before the kernel in front of it has ended.
// 4. Few instructions for each weight, since at full speed a multiprocessor has 140 cycles for a unit and four schedulers:
//    a scale is multiplied in together with the 2^126 that raw operands lack.
//
// Wide scales (and half) instead scale the sums of 32 columns in float32, which any power of two allows.
#pragma once

#include <type_traits>

#include "experts/fragments.cuh"

namespace moe {

// Pieces of weights that a warp has room for, and units of a piece.
constexpr int kSlots = 3;
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

// What a warp is in its block, and the block's shared memory; src/experts/cuda/path.rs reserves it.
template <typename Format, typename T, int kBlocks>
struct Place {
    uint32_t lane, warps, groups;  // warps of a group that multiply
    uint32_t group, warp;          // `warp` is `warps` for the one that finishes
    T* tokens;                     // [8 kBlocks, pitch]
    uint32_t pitch;        // a row is 16 bytes longer than it must be, so that the 8 rows of a matrix lie in different banks
    float4* sums;          // of this lane, of the group's [kSums, warps, kBlocks, 32 lanes]
    SharedAddress pieces;  // of this warp, [kSlots] of kPieceBytes

    __device__ __forceinline__ Place(unsigned char* memory, const ProjectionArguments& a)
        : lane(threadIdx.x % 32), warps(a.warps), groups(blockDim.x / 32 / (a.warps + 1)), pitch(a.in_features + 8) {
        const uint32_t of_block = threadIdx.x / 32, multiplying = groups * warps;
        group = of_block < multiplying ? of_block / warps : of_block - multiplying;
        warp = of_block < multiplying ? of_block % warps : warps;
        tokens = reinterpret_cast<T*>(memory);
        float4* const all = reinterpret_cast<float4*>(memory + 8 * kBlocks * pitch * sizeof(T));
        sums = all + group * (kSums * sums_of_item()) + lane;
        pieces = shared_address(all + groups * (kSums * sums_of_item())) + of_block * (kSlots * kPieceBytes<Format>);
    }
    __device__ __forceinline__ uint32_t sums_of_item() const { return warps * kBlocks * 32; }
    // The threads of the group, of which all but the last 32 multiply; those of all groups that multiply.
    __device__ __forceinline__ uint32_t threads() const { return warps * 32 + 32; }
    __device__ __forceinline__ uint32_t multiplying() const { return groups * warps * 32; }
};

// A group's way through its items.
struct Walk {
    uint32_t tile, band, bands, step;
    uint32_t left;  // items of the block from here on

    // From the item `first` of all, the first of `count` of a block that `groups` groups take in turn.
    __device__ __forceinline__ Walk(uint64_t first, uint32_t count, uint32_t bands, uint32_t groups, uint32_t group)
        : tile(static_cast<uint32_t>(first / bands)), band(static_cast<uint32_t>(first % bands)), bands(bands), step(groups),
          left(count) {
        skip(group);
    }
    __device__ __forceinline__ bool ends() const { return left == 0; }
    __device__ __forceinline__ void next() { skip(step); }

  private:
    __device__ __forceinline__ void skip(uint32_t items) {
        left -= min(left, items);
        band += items;
        while (band >= bands) {
            band -= bands;
            ++tile;
        }
    }
};

// The pieces of weights of a warp, item after item. Whole: every warp has kPieceUnits of each item, one piece.
template <typename Format, bool kWhole>
struct Stream {
    static constexpr uint32_t kUnits = kPieceUnits<Format>;

    const ProjectionArguments& a;
    Walk walk;             // of the next piece
    uint32_t units;        // of a band
    uint32_t first, mine;  // of the warp's units in a band, and their number
    uint32_t tile;         // whose expert `values` points into
    uint32_t done = 0;     // units of the item before the next piece
    const unsigned char *values, *scales;  // of the next piece, this lane's part
    SharedAddress slots;   // this lane's part
    uint32_t filled = 0;   // bytes before the next slot

    __device__ __forceinline__ Stream(
        const ProjectionArguments& a, Walk walk, uint32_t units, uint32_t first, uint32_t mine, SharedAddress slots)
        : a(a), walk(walk), units(units), first(first), mine(mine), slots(slots + threadIdx.x % 32 * 16) {
        if (!walk.ends()) enter_tile();
    }

    __device__ __forceinline__ void enter_tile() {
        tile = walk.tile;
        const uint64_t unit = (uint64_t(a.tile_experts[tile]) * walk.bands + walk.band) * units + first;
        const uint32_t part = threadIdx.x % 32 * 16;
        values = static_cast<const unsigned char*>(a.weights) + unit * kUnitBytes<Format> + part;
        scales = static_cast<const unsigned char*>(a.scales) + unit * kScaleBytes + part;
    }

    __device__ __forceinline__ void advance(uint32_t count) {
        values += uint64_t(count) * kUnitBytes<Format>;
        if (Format::kHasScales) scales += uint64_t(count) * kScaleBytes;
    }

    // Puts the next piece under way, or an empty group, so that groups can be counted.
    __device__ __forceinline__ void fetch() {
        if (!walk.ends()) {
            const uint32_t count = kWhole ? kUnits : min(kUnits, mine - done);
            const SharedAddress slot = slots + filled;
#pragma unroll
            for (uint32_t i = 0; i < kUnits * Format::kWords; ++i) {
                if (kWhole || i < count * Format::kWords) copy_16(slot + i * 512, values + i * 512);
            }
            if (Format::kHasScales && threadIdx.x % 32 < count * 2) copy_16(slot + kUnits * kUnitBytes<Format>, scales);
            filled = filled == (kSlots - 1) * kPieceBytes<Format> ? 0 : filled + kPieceBytes<Format>;
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
        commit_copies();
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
        uint32_t pairs[4] = {kPairOf126, kPairOf126, kPairOf126, kPairOf126};
        if constexpr (!Format::kScalesSums) pairs_of_scales(unit.scale, pairs);
#pragma unroll
        for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = multiply_pairs(a[i / 4][i % 4], pairs[i / 8 * 2 + i % 2]);
    } else {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            a[s][0] = unit.words[s].x, a[s][1] = unit.words[s].y, a[s][2] = unit.words[s].z, a[s][3] = unit.words[s].w;
        }
    }
}

// Adds the products of a unit; `tokens` is this lane's row of the matrices of its columns.
template <typename Format, typename T, int kBlocks>
__device__ __forceinline__ void add_unit(
    const Unit<Format>& unit, SharedAddress tokens, uint32_t block_bytes, Accumulators<kBlocks>& c) {
    uint32_t b[kBlocks][2][4];  // B operands of two steps each
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        load_matrices(b[block][0], tokens + block * block_bytes);
        load_matrices(b[block][1], tokens + block * block_bytes + 64);
    }
    uint32_t a[kSteps][4];
    decode_unit<Format, T>(unit, a);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        const auto multiply = [&](int s, float(&sums)[4]) {
            mma_16x8x16<T>(sums, a[s], {b[block][s / 2][s % 2 * 2], b[block][s / 2][s % 2 * 2 + 1]});
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

// The number of tiles; all threads call it.
__device__ __forceinline__ uint32_t count_tiles(const ProjectionArguments& a) {
    uint32_t count = 0;
    for (uint32_t first = 0; first < a.max_tiles; first += blockDim.x) {
        const uint32_t tile = first + threadIdx.x;
        count += __syncthreads_count(tile < a.max_tiles && a.tile_experts[tile] != kNothing);
    }
    return count;
}

// Loads the tokens of a tile, by all warps that multiply; rows behind the last are 0.
template <typename T, Kind kKind>
__device__ __forceinline__ void load_tile(
    const ProjectionArguments& a, const Tile& tile, T* tokens, uint32_t pitch, uint32_t threads) {
    const uint32_t words = a.in_features / 8;  // of 16 bytes
    const uint32_t rows = (tile.count + 7) / 8 * 8;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < rows * words; i += threads) {
        const uint32_t row = i / words, word = i - row * words;
        uint4 elements = make_uint4(0, 0, 0, 0);
        if (row < tile.count) {
            const uint32_t place = tile.first + row;
            const uint64_t from = kKind == kGateUp ? a.sorted_slots[place] / a.top_k : place;
            elements = *(reinterpret_cast<const uint4*>(static_cast<const T*>(a.input) + from * a.in_features) + word);
        }
        *reinterpret_cast<uint4*>(tokens + row * pitch + word * 8) = elements;
    }
}

// A warp that multiplies.
template <typename Format, typename T, Kind kKind, int kBlocks, bool kWhole>
__device__ __forceinline__ void multiply_items(
    const ProjectionArguments& a, const Place<Format, T, kBlocks>& place, Walk walk, uint32_t first_tile,
    uint32_t last_tile) {
    constexpr uint32_t kUnits = kPieceUnits<Format>, kColumnBytes = kUnitColumns * sizeof(T);
    const uint32_t units = a.in_features / kUnitColumns;
    const uint32_t first = units * place.warp / place.warps, mine = units * (place.warp + 1) / place.warps - first;
    Stream<Format, kWhole> stream(a, walk, units, first, mine, place.pieces);
#pragma unroll
    for (int i = 0; i + 1 < kSlots; ++i) stream.fetch();
    if (kKind == kDown) wait_for_previous_kernel();

    const uint32_t row_bytes = place.pitch * sizeof(T), block_bytes = 8 * row_bytes;
    const SharedAddress tokens =
        shared_address(place.tokens) + place.lane % 8 * row_bytes + place.lane / 8 * 16 + first * kColumnBytes;
    const SharedAddress values = place.pieces + place.lane * 16;
    const SharedAddress scales = place.pieces + kUnits * kUnitBytes<Format> + place.lane / 4 * 4;
    uint32_t taken = 0, room = 0, items = 0;  // bytes before the slot, room of sums
    for (uint32_t tile = first_tile; tile <= last_tile; ++tile) {
        wait_at_barrier(kTokens, place.multiplying());  // nobody needs the tile before any more
        load_tile<T, kKind>(a, tile_of(a, tile, 8 * kBlocks), place.tokens, place.pitch, place.multiplying());
        wait_at_barrier(kTokens, place.multiplying());
        for (; !walk.ends() && walk.tile == tile; walk.next(), ++items) {
            Accumulators<kBlocks> c;
            for (uint32_t done = 0; done < mine; done += kUnits) {
                wait_for_copies<kSlots - 2>();
                __syncwarp();  // scales were copied by other lanes
                const auto load = [&](Unit<Format>& unit, uint32_t i) {
                    unit.load(values + taken + i * kUnitBytes<Format>, scales + taken + i * kScaleBytes);
                };
                const auto add = [&](const Unit<Format>& unit, uint32_t i) {
                    add_unit<Format, T, kBlocks>(unit, tokens + (done + i) * kColumnBytes, block_bytes, c);
                };
                if (kWhole || mine - done >= kUnits) {
                    Unit<Format> all[kUnits];
#pragma unroll
                    for (uint32_t i = 0; i < kUnits; ++i) load(all[i], i);
#pragma unroll
                    for (uint32_t i = 0; i < kUnits; ++i) add(all[i], i);
                } else {
#pragma unroll 1
                    for (uint32_t i = 0; i < mine - done; ++i) {
                        Unit<Format> unit;
                        load(unit, i);
                        add(unit, i);
                    }
                }
                taken = taken == (kSlots - 1) * kPieceBytes<Format> ? 0 : taken + kPieceBytes<Format>;
                __syncwarp();
                stream.fetch();
                if (kWhole) break;
            }
            const uint32_t barrier = place.group * kSums + room;
            if (items >= kSums) wait_at_barrier(kEmpty + barrier, place.threads());
            float4* const sums = place.sums + room * place.sums_of_item() + place.warp * kBlocks * 32;
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                sums[block * 32] = make_float4(c.sums[block][0], c.sums[block][1], c.sums[block][2], c.sums[block][3]);
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
            float* const out = static_cast<float*>(a.output) + to + band * 16 + g;
            out[0] = c[i];
            out[8] = c[2 + i];
        }
    }
}

// A warp that finishes.
template <typename Format, typename T, Kind kKind, int kBlocks>
__device__ __forceinline__ void finish_items(
    const ProjectionArguments& a, const Place<Format, T, kBlocks>& place, Walk walk) {
    const uint32_t g = place.lane / 4;
    const uint32_t rows = kKind == kGateUp ? 2 * a.out_features : a.out_features;
    Tile tile{};
    uint32_t of_tile = kNothing, room = 0;
    for (; !walk.ends(); walk.next()) {
        if (walk.tile != of_tile) {
            of_tile = walk.tile;
            tile = tile_of(a, of_tile, 8 * kBlocks);
        }
        float bias[2] = {};
        if (a.bias != nullptr) {
            const float* const of_expert = a.bias + uint64_t(tile.expert) * rows;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                bias[i] = of_expert[published_row(kKind, a.gate_up_rows, rows, walk.band, g + 8 * i)];
            }
        }
        const uint32_t barrier = place.group * kSums + room;
        wait_at_barrier(kFull + barrier, place.threads());
        float c[kBlocks][4] = {};
        const float4* const sums = place.sums + room * place.sums_of_item();
#pragma unroll 4
        for (uint32_t w = 0; w < place.warps; ++w) {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                const float4 more = sums[(w * kBlocks + block) * 32];
                c[block][0] += more.x, c[block][1] += more.y, c[block][2] += more.z, c[block][3] += more.w;
            }
        }
        if (walk.left > kSums * walk.step) pass_barrier(kEmpty + barrier, place.threads());
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int i = 0; i < 4; ++i) c[block][i] += bias[i / 2];
            write_results<T, kKind>(a, tile, walk.band, block, c[block]);
        }
        room = room + 1 == kSums ? 0 : room + 1;
    }
}

template <typename Format, typename T, Kind kKind, int kBlocks>
__device__ __forceinline__ void project_resident(const ProjectionArguments& a) {
    MOE_DYNAMIC_SHARED(unsigned char, memory);
    const Place<Format, T, kBlocks> place(memory, a);
    const uint32_t bands = a.out_features / (kKind == kGateUp ? 8 : 16);
    allow_next_kernel();
    // The order was there before the kernel in front of `down` began.
    if (kKind == kGateUp) wait_for_previous_kernel();
    const uint64_t all = uint64_t(count_tiles(a)) * bands;
    const uint64_t first = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
    if (first == end) return;
    const Walk walk(first, static_cast<uint32_t>(end - first), bands, place.groups, place.group);
    const uint32_t first_tile = static_cast<uint32_t>(first / bands), last_tile = static_cast<uint32_t>((end - 1) / bands);
    if (place.warp == place.warps) {
        finish_items<Format, T, kKind, kBlocks>(a, place, walk);
    } else if (a.in_features == place.warps * kPieceUnits<Format> * kUnitColumns) {
        multiply_items<Format, T, kKind, kBlocks, true>(a, place, walk, first_tile, last_tile);
    } else {
        multiply_items<Format, T, kKind, kBlocks, false>(a, place, walk, first_tile, last_tile);
    }
}

}  // namespace moe
