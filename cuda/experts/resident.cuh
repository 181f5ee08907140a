// The experts' projections for few tokens of an expert: they stay in shared memory while the weights go past them once.
//
//     item      one band of 16 rows of one tile's expert; a block takes items side by side, a tile after the other
//     warp w    the units of columns U w / W .. U (w + 1) / W of every item, W warps in a block
//     sums      [16 rows, 8 kBlocks tokens] of each warp; added up in the order of warps by one warp, which goes on to bias,
//               activation and rounding while the others are at the next item
//
// Made for m16n8k16 with the weights as its rows, so that 8 tokens fill it. Why it is fast: what limits is how fast weights
// come from memory.
//
// 1. Every byte of them is read once, 16 bytes a lane and side by side, and straight from the fragment order
//    (experts/fragments.cuh): a lane decodes what it has copied itself.
// 2. A warp has kSlots pieces of the coming items under way at any time, whatever the others do; a block's barrier, one for
//    each item, makes nobody wait for memory.
// 3. `down` has its first pieces under way before the kernel in front of it has ended.
//
// MXFP4: the products of a block of 32 columns are summed before they are scaled, once, in float32. So a scale may be any
// power of two, and scaling costs less than to scale the weights.
#pragma once

#include "experts/fragments.cuh"

namespace moe {

// Pieces of weights that a warp has room for, and units of a piece.
constexpr int kSlots = 4;
constexpr int kMaxWarps = 16;
template <typename Format> constexpr int kPieceUnits = Format::kWords == 1 ? 3 : 1;

// Bytes of a piece: values, then scales.
template <typename Format>
constexpr uint32_t kPieceBytes = kPieceUnits<Format> * (Format::kWords * 512 + (Format::kScaled ? 32 : 0));

// A operands of bfloat16 or half from a lane's part of a unit, for one step; MXFP4 for half is 2^-14 of its value.
template <typename T, typename Format> struct Operands;
template <typename T> struct Operands<T, Plain> {
    static __device__ __forceinline__ void load(const uint4* lane_words, int step, uint32_t (&a)[4]) {
        const uint4 words = lane_words[step * 32];
        a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
    }
};
template <> struct Operands<__nv_bfloat16, MxFp4> {
    static constexpr float kLacks = 1.0f;
    static __device__ __forceinline__ void decode(uint32_t word, uint32_t (&a)[4]) {
        MxFp4::raw_operands(word, a);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = multiply_pairs(a[p], kPairOf126);
    }
};
template <> struct Operands<__half, MxFp4> {
    static constexpr float kLacks = 16384.0f;
    static __device__ __forceinline__ void decode(uint32_t word, uint32_t (&a)[4]) {
        MxFp4::raw_operands(word, a);
        // A half has its exponent three bits further up.
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = (a[p] & 0x80008000u) | (a[p] & 0x01c001c0u) << 3;
    }
};

template <int kBlocks>
struct Accumulators {
    float sums[kBlocks][4] = {};
};

// The tokens' elements of a unit, B operands of its four steps, for the 8 tokens of block `block`.
template <typename T>
__device__ __forceinline__ void load_tokens(
    const T* tokens, uint32_t pitch, uint32_t unit, int block, uint32_t lane, uint32_t (&b)[kSteps][2]) {
    const T* const at = tokens + (block * 8 + lane % 8) * pitch + unit * kUnitColumns + lane / 8 * 8;
    uint32_t first[4], second[4];
    load_matrices(first, at);
    load_matrices(second, at + 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        b[i / 2][i % 2] = first[i];
        b[2 + i / 2][i % 2] = second[i];
    }
}

// Adds the products of a unit: `values` and `scales` lie in shared memory.
template <typename Format, typename T, int kBlocks>
__device__ __forceinline__ void add_unit(
    const uint4* values, const uint32_t* scales, const T* tokens, uint32_t pitch, uint32_t unit, uint32_t lane,
    Accumulators<kBlocks>& c) {
    if constexpr (Format::kScaled) {
        const uint4 words = values[lane];
        const uint32_t all[4] = {words.x, words.y, words.z, words.w};
        const uint32_t scale = scales[lane / 4];
        uint32_t a[kSteps][4];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) Operands<T, Format>::decode(all[s], a[s]);
        float powers[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) powers[i] = power_of_scale(scale >> (8 * i) & 0xffu);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            uint32_t b[kSteps][2];
            load_tokens(tokens, pitch, unit, block, lane, b);
            float parts[2][4] = {};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) mma_16x8x16<T>(parts[s / 2], a[s], b[s]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float part = parts[i / 4][i % 4] * Operands<T, Format>::kLacks;
                float& sum = c.sums[block][i % 4];
                sum = fmaf(powers[i / 4 * 2 + i % 4 / 2], part, sum);
            }
        }
    } else {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            uint32_t b[kSteps][2];
            load_tokens(tokens, pitch, unit, block, lane, b);
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                uint32_t a[4];
                Operands<T, Format>::load(values + lane, s, a);
                mma_16x8x16<T>(c.sums[block], a, b[s]);
            }
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

// The shared memory of a block; src/experts/cuda.rs reserves it.
template <typename Format, typename T, int kBlocks>
struct Rooms {
    T* tokens;        // [8 kBlocks, pitch]
    uint32_t pitch;   // a row is 16 bytes longer than it must be, so that the 8 rows of a matrix lie in different banks
    float4* sums;     // [2, warps, kBlocks, 32 lanes]
    unsigned char* pieces;  // of this warp, [kSlots] of kPieceBytes

    __device__ __forceinline__ Rooms(unsigned char* memory, uint32_t in_features)
        : tokens(reinterpret_cast<T*>(memory)), pitch(in_features + 8) {
        const uint32_t warps = blockDim.x / 32;
        sums = reinterpret_cast<float4*>(memory + 8 * kBlocks * pitch * sizeof(T));
        pieces = reinterpret_cast<unsigned char*>(sums + 2 * warps * kBlocks * 32) +
                 threadIdx.x / 32 * kSlots * kPieceBytes<Format>;
    }
};

// The pieces of weights of a warp, item after item, with kSlots - 1 of them under way.
template <typename Format>
struct Stream {
    const unsigned char* values;
    const unsigned char* scales;
    unsigned char* slots;
    uint64_t unit;            // of the next piece, among all units of the expert weights
    uint32_t bands, tile, band;  // of the next piece
    uint32_t units;           // of a band
    uint32_t done, mine;      // units of the warp in the item: those before the next piece, and all
    uint32_t first_unit;
    uint32_t left;            // items from that of the next piece on
    uint32_t fill = 0;        // slot of the next piece
    const uint32_t* tile_experts;

    static constexpr uint32_t kUnits = kPieceUnits<Format>;

    __device__ __forceinline__ void enter_item() {
        unit = (uint64_t(tile_experts[tile]) * bands + band) * units + first_unit;
    }

    // Puts the next piece under way, or an empty group, so that groups can be counted.
    __device__ __forceinline__ void fetch(uint32_t lane) {
        if (left > 0) {
            const uint32_t count = min(kUnits, mine - done);
            unsigned char* const slot = slots + fill * kPieceBytes<Format>;
            const unsigned char* const from = values + unit * (Format::kWords * 512);
#pragma unroll
            for (uint32_t i = 0; i < kUnits * Format::kWords; ++i) {
                if (i < count * Format::kWords) copy_16(slot + (i * 32 + lane) * 16, from + (i * 32 + lane) * 16);
            }
            if (Format::kScaled && lane < count * 2) {
                copy_16(slot + kUnits * Format::kWords * 512 + lane * 16, scales + unit * 32 + lane * 16);
            }
            fill = fill + 1 == kSlots ? 0 : fill + 1;
            unit += count;
            done += count;
            if (done == mine) {
                done = 0;
                --left;
                if (++band == bands) {
                    band = 0;
                    ++tile;
                }
                if (left > 0) enter_item();
            }
        }
        commit_copies();
    }
};

// Loads the tokens of a tile; rows behind the last are 0. All threads call it.
template <typename T, int kBlocks>
__device__ __forceinline__ void load_tile(
    const ProjectionArguments& a, Kind kind, const Tile& tile, T* tokens, uint32_t pitch) {
    const uint32_t words = a.in_features / 8;  // of 16 bytes
    const uint32_t rows = (tile.count + 7) / 8 * 8;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < rows * words; i += blockDim.x) {
        const uint32_t row = i / words, word = i - row * words;
        uint4 elements = make_uint4(0, 0, 0, 0);
        if (row < tile.count) {
            const uint32_t place = tile.first + row;
            const uint64_t from = kind == kGateUp ? a.sorted_slots[place] / a.top_k : place;
            elements = *(reinterpret_cast<const uint4*>(static_cast<const T*>(a.input) + from * a.in_features) + word);
        }
        *reinterpret_cast<uint4*>(tokens + row * pitch + word * 8) = elements;
    }
}

// Adds up the warps' sums of an item and writes its results: by one warp.
template <typename T, Kind kKind, int kBlocks>
__device__ __forceinline__ void finish_item(
    const ProjectionArguments& a, const Tile& tile, uint32_t band, const float4* sums, uint32_t lane) {
    const uint32_t warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t rows = kKind == kGateUp ? 2 * a.out_features : a.out_features;
    float bias[2] = {};
    if (a.bias != nullptr) {
        const float* const of_expert = a.bias + uint64_t(tile.expert) * rows;
#pragma unroll
        for (int i = 0; i < 2; ++i) bias[i] = of_expert[published_row(kKind, a.gate_up_rows, rows, band, g + 8 * i)];
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        if (block * 8 >= tile.count) break;
        float c[4] = {bias[0], bias[0], bias[1], bias[1]};
        float4 sum = sums[block * 32 + lane];
        for (uint32_t w = 1; w < warps; ++w) {
            const float4 more = sums[(w * kBlocks + block) * 32 + lane];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        c[0] += sum.x, c[1] += sum.y, c[2] += sum.z, c[3] += sum.w;
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
}

template <typename Format, typename T, Kind kKind, int kBlocks>
__device__ __forceinline__ void project_resident(const ProjectionArguments& a) {
    MOE_DYNAMIC_SHARED(unsigned char, memory);
    const Rooms<Format, T, kBlocks> rooms(memory, a.in_features);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const uint32_t units = a.in_features / kUnitColumns, bands = a.out_features / (kKind == kGateUp ? 8 : 16);
    allow_next_kernel();
    // The order was there before the kernel in front of `down` began.
    if (kKind == kGateUp) wait_for_previous_kernel();
    const uint64_t num_items = uint64_t(count_tiles(a)) * bands;
    const uint64_t first = num_items * blockIdx.x / gridDim.x, end = num_items * (blockIdx.x + 1) / gridDim.x;
    if (first == end) return;

    const uint32_t first_unit = units * warp / warps, mine = units * (warp + 1) / warps - first_unit;
    Stream<Format> stream;
    stream.values = static_cast<const unsigned char*>(a.weights);
    stream.scales = static_cast<const unsigned char*>(a.scales);
    stream.slots = rooms.pieces;
    stream.bands = bands;
    stream.tile = first / bands;
    stream.band = first % bands;
    stream.units = units;
    stream.done = 0;
    stream.mine = mine;
    stream.first_unit = first_unit;
    stream.left = static_cast<uint32_t>(end - first);
    stream.tile_experts = a.tile_experts;
    stream.enter_item();
#pragma unroll
    for (int i = 0; i + 1 < kSlots; ++i) stream.fetch(lane);

    if (kKind == kDown) wait_for_previous_kernel();
    uint32_t tile_index = stream.tile, band = 0, slot = 0;
    {
        const uint64_t start = first;
        tile_index = static_cast<uint32_t>(start / bands);
        band = static_cast<uint32_t>(start % bands);
    }
    Tile tile{};
    bool entered = false;
    float4* sums = rooms.sums;
    const uint32_t sums_of_item = warps * kBlocks * 32;
    uint32_t turn = 0;
    for (uint64_t item = first; item < end; ++item) {
        if (!entered) {
            tile = tile_of(a, tile_index, 8 * kBlocks);
            __syncthreads();  // nobody needs the tile before any more
            load_tile<T, kBlocks>(a, kKind, tile, rooms.tokens, rooms.pitch);
            __syncthreads();
            entered = true;
        }
        Accumulators<kBlocks> c;
        for (uint32_t done = 0; done < mine; done += kPieceUnits<Format>) {
            wait_for_copies<kSlots - 2>();
            __syncwarp();  // scales were copied by other lanes
            const unsigned char* const piece = rooms.pieces + slot * kPieceBytes<Format>;
            const uint32_t count = min(uint32_t(kPieceUnits<Format>), mine - done);
#pragma unroll
            for (uint32_t i = 0; i < kPieceUnits<Format>; ++i) {
                if (i < count) {
                    const uint4* const values = reinterpret_cast<const uint4*>(piece + i * Format::kWords * 512);
                    const uint32_t* const scales =
                        reinterpret_cast<const uint32_t*>(piece + kPieceUnits<Format> * Format::kWords * 512) + i * 8;
                    add_unit<Format, T, kBlocks>(
                        values, scales, rooms.tokens, rooms.pitch, first_unit + done + i, lane, c);
                }
            }
            slot = slot + 1 == kSlots ? 0 : slot + 1;
            __syncwarp();
            stream.fetch(lane);
        }
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            sums[(warp * kBlocks + block) * 32 + lane] =
                make_float4(c.sums[block][0], c.sums[block][1], c.sums[block][2], c.sums[block][3]);
        }
        __syncthreads();
        if (warp == turn) finish_item<T, kKind, kBlocks>(a, tile, band, sums, lane);
        turn = turn + 1 == warps ? 0 : turn + 1;
        sums = sums == rooms.sums ? rooms.sums + sums_of_item : rooms.sums;
        if (++band == bands) {
            band = 0;
            ++tile_index;
            entered = false;
        }
    }
}

}  // namespace moe
