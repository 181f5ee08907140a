// Both projections of a layer for many tokens, on the tensor cores of compute capability 9.0, in one launch.
//
//     gate_up   h[place]    = round(activation(W1 x + b1)), of the token at each place of the order
//     down      rows[place] = W2 h[place] + b2, in float32 or rounded
//
// An item of work is 192 rows of an expert's matrix (12 bands) by a tile of up to 96 or 160 places. As many blocks as
// multiprocessors take items in turn, all of gate_up and then all of down: block b has items b, b + blocks, ..; the row blocks
// of a tile follow each other, and the tiles of an expert, so that its weights come from device memory once and its tokens
// stay in the L2 cache. Of the h of a tile `down` waits for all row blocks, which a number counts; they began long before.
//
// Work goes in chunks of 64 columns. Tokens lie as a block takes them: experts/gather.cu brings them into this order, and
// gate_up leaves h in it.
//
//     [num_slots, features] becomes, tile after tile, [chunks, places of the tile, 8 pieces of 16 bytes], swizzled
//
// A block is four warpgroups, connected by a ring of pieces of weights and a ring of stages of tokens:
//
//     3 threads       have the copy engine bring the weights of 12 bands, three chunks of MXFP4 (1536 bytes a band) or two of
//                     16 bits at a time: smaller pieces would come slower, since each takes its time whatever its size
//     1 thread        has it bring tokens, as many chunks at a time as there are in a piece
//     3 warpgroups    each has 64 rows, each warp of it a band; they take weights to registers, make 16-bit floats of them, and
//                     multiply them with the tokens of a chunk (wgmma) while the next ones are made
//
// Why it is fast:
//
// 1. Weights are the A operand, so that their decoded form never sees shared memory, and tokens the B operand, whose number is
//    a multiple of 16: a short tile costs what it has.
// 2. Whoever multiplies copies nothing, waits for nothing but what it needs, and looks after rings once in three chunks.
// 3. The copy engine brings all of it, in few large pieces, and what it brings the products see without a fence.
// 4. In one launch the items of both projections fill the last round of blocks together, and nothing drains between them.
//
// Limits: in_features is a multiple of 64, a matrix has a multiple of 16 rows; MXFP4 scales are at most 128.
// Launch: cooperative (blocks wait for each other), kTiledThreads threads, tiled_shared_bytes<F, S>() bytes of dynamic shared
// memory, up to one block for each multiprocessor.
#pragma once

#include <type_traits>

#include "common/hopper.cuh"
#include "common/signals.cuh"
#include "experts/fragments.cuh"

namespace moe {

constexpr uint32_t kTiledWorkers = 3 * kWarpgroup, kTiledThreads = kTiledWorkers + kWarpgroup;
constexpr uint32_t kWeightWarps = 3;  // and one for tokens
constexpr uint32_t kBlockBands = kTiledWorkers / 32;
constexpr uint32_t kChunkColumns = 64;
constexpr int kChunkSteps = kChunkColumns / 16;

// How large tiles are: places, at most, of which a multiple of kStep_ is multiplied; stages that a block has room for;
// registers of a thread that multiplies and of one that brings, of the 512 that four warpgroups have for a thread of each.
template <uint32_t kPlaces_, uint32_t kStep_, uint32_t kStages_, int kWorkerRegisters_>
struct Size {
    static constexpr uint32_t kPlaces = kPlaces_, kStep = kStep_, kStages = kStages_;
    static constexpr int kSums = kPlaces / 2;  // of a thread
    static constexpr int kWorkerRegisters = kWorkerRegisters_, kProducerRegisters = 512 - 3 * kWorkerRegisters_;
};
using FewPlaces = Size<96, 16, 3, 152>;
using ManyPlaces = Size<160, 16, 2, 160>;

// Where the tile whose first place this is begins, in bytes.
__device__ __forceinline__ uint64_t tile_offset(uint32_t first, uint32_t features) { return uint64_t(first) * features * 2; }

#ifdef MOE_HOPPER

// ------------------------------------------------------------------------------------------------------------------
// Formats: pieces of weights that a block has room for, chunks of a piece, bytes of a band in a chunk, and the A operands that
// these give

struct TiledMxFp4 {
    using Element = __nv_bfloat16;
    static constexpr uint32_t kSlots = 5, kPieceChunks = 3, kValueBytes = 512, kScaleBytes = 32;

    struct Raw {
        uint4 words;
        uint32_t scale;
    };
    // `values` is where this lane's are, and `scales` too.
    static __device__ __forceinline__ void load(Raw& raw, SharedAddress values, SharedAddress scales) {
        raw.words = load_shared_16(values);
        raw.scale = load_shared_4(scales);
    }
    static __device__ __forceinline__ void decode(uint32_t (&a)[kChunkSteps][4], const Raw& raw) {
        uint32_t factors[2];
        factors_of_scales(raw.scale, factors);
        MxFp4::raw_operands(raw.words.x, a[0]);
        MxFp4::raw_operands(raw.words.y, a[1]);
        MxFp4::raw_operands(raw.words.z, a[2]);
        MxFp4::raw_operands(raw.words.w, a[3]);
        scale_operands<0>(a[0], factors);
        scale_operands<1>(a[1], factors);
        scale_operands<2>(a[2], factors);
        scale_operands<3>(a[3], factors);
    }
};

template <typename T>
struct TiledDense {
    using Element = T;
    static constexpr uint32_t kSlots = 3, kPieceChunks = 2, kValueBytes = 2048, kScaleBytes = 0;

    // Nothing is to be made of them, so they are loaded where they are needed.
    struct Raw {
        SharedAddress values;
    };
    static __device__ __forceinline__ void load(Raw& raw, SharedAddress values, SharedAddress) { raw.values = values; }
    static __device__ __forceinline__ void decode(uint32_t (&a)[kChunkSteps][4], const Raw& raw) {
#pragma unroll
        for (int s = 0; s < kChunkSteps; ++s) {
            const uint4 words = load_shared_16(raw.values + s * 512);
            a[s][0] = words.x, a[s][1] = words.y, a[s][2] = words.z, a[s][3] = words.w;
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------
// Items, and the shared memory that they go through

// The items of a projection.
struct TiledShape {
    uint32_t num_bands, row_blocks, chunks;

    __device__ __forceinline__ TiledShape(const ProjectionArguments& a, bool is_down)
        : num_bands((is_down ? 1 : 2) * a.out_features / kBandRows),
          row_blocks((num_bands + kBlockBands - 1) / kBlockBands), chunks(a.in_features / kChunkColumns) {}
};

// Some rows of an expert's matrix by some of its places. 0 places: there are no more items.
template <typename S>
struct TiledItem {
    uint32_t expert, first, count;  // as in Tile
    uint32_t band;                  // the first of the row block
    uint32_t tile;
    uint32_t is_down;

    // Where item `number` is; tile is kNothing behind the last one. What else there is of it must be looked up.
    static __device__ __forceinline__ TiledItem of_number(const LayerArguments& a, uint32_t num_tiles, uint32_t number) {
        const uint32_t before = num_tiles * TiledShape(a.gate_up, false).row_blocks;
        const bool is_down = number >= before;
        if (is_down) number -= before;
        const uint32_t row_blocks = TiledShape(is_down ? a.down : a.gate_up, is_down).row_blocks, tile = number / row_blocks;
        return {0, 0, 0, (number - tile * row_blocks) * kBlockBands, tile < num_tiles ? tile : kNothing, is_down};
    }
    // The columns of its products, and bytes of a chunk of as many rows.
    __device__ __forceinline__ uint32_t columns() const {
        return (count + S::kStep - 1) / S::kStep * S::kStep;
    }
    __device__ __forceinline__ uint32_t chunk_bytes() const { return columns() * kSwizzledRowBytes; }

    __device__ __forceinline__ const ProjectionArguments& of(const LayerArguments& a) const {
        return is_down ? a.down : a.gate_up;
    }
};

// The shared memory of a block: a ring of stages of tokens, with the item whose first stage it is, and a ring of pieces of
// weights, each with barriers for "full" and "empty".
template <typename F, typename S>
struct Memory {
    static constexpr uint32_t kStages = S::kStages, kSlots = F::kSlots;
    static constexpr uint32_t kPieceValues = kBlockBands * F::kPieceChunks * F::kValueBytes;
    static constexpr uint32_t kPieceBytes = kPieceValues + kBlockBands * F::kPieceChunks * F::kScaleBytes;
    static constexpr uint32_t kItemBytes = 32;
    static constexpr uint32_t kStageBytes = F::kPieceChunks * S::kPlaces * kSwizzledRowBytes;
    static constexpr uint32_t kPieces = kStages * kStageBytes;
    static constexpr uint32_t kItems = kPieces + kSlots * kPieceBytes;
    static constexpr uint32_t kFull = kItems + kStages * kItemBytes;
    static constexpr uint32_t kEmpty = kFull + kStages * kBarrierBytes;
    static constexpr uint32_t kPieceFull = kEmpty + kStages * kBarrierBytes;
    static constexpr uint32_t kPieceEmpty = kPieceFull + kSlots * kBarrierBytes;
    static constexpr uint32_t kEnd = kPieceEmpty + kSlots * kBarrierBytes;
    static constexpr uint32_t kBytes = (kEnd + kSwizzleAlignment - 1) / kSwizzleAlignment * kSwizzleAlignment;

    SharedAddress start;

    __device__ __forceinline__ SharedAddress tokens(uint32_t stage) const { return start + stage * kStageBytes; }
    __device__ __forceinline__ SharedAddress item(uint32_t stage) const { return start + (kItems + stage * kItemBytes); }
    __device__ __forceinline__ SharedAddress full(uint32_t stage) const { return start + (kFull + stage * kBarrierBytes); }
    __device__ __forceinline__ SharedAddress empty(uint32_t stage) const { return start + (kEmpty + stage * kBarrierBytes); }
    __device__ __forceinline__ SharedAddress piece(uint32_t slot) const { return start + (kPieces + slot * kPieceBytes); }
    __device__ __forceinline__ SharedAddress piece_full(uint32_t slot) const {
        return start + (kPieceFull + slot * kBarrierBytes);
    }
    __device__ __forceinline__ SharedAddress piece_empty(uint32_t slot) const {
        return start + (kPieceEmpty + slot * kBarrierBytes);
    }

    // By the first threads, with a barrier of the block behind it.
    __device__ __forceinline__ void start_barriers(uint32_t thread) const {
        if (thread < kStages) {
            start_barrier(full(thread), 1);
            start_barrier(empty(thread), kBlockBands);
        }
        if (thread < kSlots) {
            start_barrier(piece_full(thread), kWeightWarps);
            start_barrier(piece_empty(thread), kBlockBands);
        }
        show_barriers();
    }
    __device__ __forceinline__ void write_item(uint32_t stage, const TiledItem<S>& of) const {
        write_16(item(stage), make_uint4(of.expert, of.first, of.count, of.band));
        write_16(item(stage) + 16, make_uint4(of.tile, of.is_down, 0, 0));
    }
    __device__ __forceinline__ TiledItem<S> read_item(uint32_t stage) const {
        const uint4 low = load_shared_16(item(stage)), high = load_shared_16(item(stage) + 16);
        return {low.x, low.y, low.z, low.w, high.x, high.y};
    }
};

template <typename F, typename S>
constexpr uint32_t tiled_shared_bytes() { return Memory<F, S>::kBytes; }

// Where a warp is in a ring of kLength, and the parity of the phase of its round.
template <uint32_t kLength>
struct RingPosition {
    uint32_t at = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++at == kLength) {
            at = 0;
            parity ^= 1;
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The threads that have the copy engine bring weights and tokens

// One of kWeightWarps threads, each with its part of the bands of a piece.
template <typename F, typename S>
struct WeightsProducer {
    static constexpr uint32_t kBands = kBlockBands / kWeightWarps;
    // Bytes of a band in a piece.
    static constexpr uint32_t kValues = F::kPieceChunks * F::kValueBytes, kScales = F::kPieceChunks * F::kScaleBytes;

    const LayerArguments& a;
    const Memory<F, S>& memory;
    const uint32_t first, num_tiles;  // of its bands
    RingPosition<F::kSlots> ring;

    __device__ __forceinline__ WeightsProducer(
        const LayerArguments& arguments, const Memory<F, S>& shared, uint32_t number, uint32_t tiles)
        : a(arguments), memory(shared), first(number * kBands), num_tiles(tiles) {}

    __device__ __forceinline__ uint32_t expert_of(const TiledItem<S>& item) const {
        return item.tile == kNothing ? 0 : a.gate_up.tile_experts[item.tile];
    }

    __device__ __forceinline__ void run() {
        uint32_t number = blockIdx.x;
        TiledItem<S> item = TiledItem<S>::of_number(a, num_tiles, number);
        uint32_t expert = expert_of(item);
        while (item.tile != kNothing) {
            number += gridDim.x;
            const TiledItem<S> next = TiledItem<S>::of_number(a, num_tiles, number);
            const uint32_t next_expert = expert_of(next);
            bring_item(item, expert);
            item = next;
            expert = next_expert;
        }
    }

    __device__ __forceinline__ void bring_item(const TiledItem<S>& item, uint32_t expert) {
        const ProjectionArguments& of = item.of(a);
        const TiledShape shape(of, item.is_down);
        // The last band stands for those behind it.
        const uint32_t band = min(item.band + first, shape.num_bands - 1), behind = shape.num_bands - 1 - band;
        uint64_t chunk = (uint64_t(expert) * shape.num_bands + band) * shape.chunks;  // the next one of the first band
        for (uint32_t left = shape.chunks; left > 0;) {
            const uint32_t count = min(left, F::kPieceChunks);
            const SharedAddress piece = memory.piece(ring.at), full = memory.piece_full(ring.at);
            wait_for_phase(memory.piece_empty(ring.at), ring.parity ^ 1);
#pragma unroll
            for (uint32_t i = 0; i < kBands; ++i) {
                const uint64_t from = chunk + min(i, behind) * shape.chunks;
                const unsigned char* const values = static_cast<const unsigned char*>(of.weights) + from * F::kValueBytes;
                copy_by_engine(piece + (first + i) * kValues, values, count * F::kValueBytes, full);
                if constexpr (F::kScaleBytes > 0) {
                    const unsigned char* const scales = static_cast<const unsigned char*>(of.scales) + from * F::kScaleBytes;
                    const SharedAddress to = piece + Memory<F, S>::kPieceValues + (first + i) * kScales;
                    copy_by_engine(to, scales, count * F::kScaleBytes, full);
                }
            }
            chunk += count;
            arrive_expecting(full, kBands * count * (F::kValueBytes + F::kScaleBytes));
            ring.advance();
            left -= count;
        }
    }
};

// One thread.
template <typename F, typename S>
struct TokensProducer {
    const LayerArguments& a;
    const Memory<F, S>& memory;
    const uint32_t num_tiles;
    RingPosition<S::kStages> ring;
    TiledItem<S> item, next;

    __device__ __forceinline__ TokensProducer(const LayerArguments& arguments, const Memory<F, S>& shared, uint32_t tiles)
        : a(arguments), memory(shared), num_tiles(tiles) {}

    // Looks up item `number`, in two steps of which the second needs what the first has loaded.
    __device__ __forceinline__ void look_up(uint32_t step, uint32_t number) {
        if (step == 0) next = TiledItem<S>::of_number(a, num_tiles, number);
        if (next.tile == kNothing) return;
        if (step == 0) {
            next.expert = a.gate_up.tile_experts[next.tile];
            next.first = a.gate_up.tile_starts[next.tile];
        } else if (step == 1) {
            next.count = min(S::kPlaces, a.gate_up.expert_offsets[next.expert + 1] - next.first);
        }
    }

    // Waits for the h of the item's tile. The last item of the tile that does leaves the numbers as they were.
    __device__ __forceinline__ void wait_for_tile() const {
        const uint32_t all = TiledShape(a.gate_up, false).row_blocks * kBlockBands;
        while (load_acquire(done_of(a, item.tile)) < all) {
        }
        if (atomicAdd(seen_of(a, item.tile), 1u) + 1 == TiledShape(a.down, true).row_blocks) *done_of(a, item.tile) = *seen_of(a, item.tile) = 0;
        show_to_engine();
    }

    __device__ __forceinline__ void bring_item(uint32_t next_number) {
        if (item.is_down) wait_for_tile();
        const ProjectionArguments& of = item.of(a);
        const uint32_t bytes = item.count * kSwizzledRowBytes;
        const unsigned char* from = static_cast<const unsigned char*>(of.input) + tile_offset(item.first, of.in_features);
        uint32_t step = 0;
        for (uint32_t left = TiledShape(of, item.is_down).chunks, is_first = 1; left > 0; is_first = 0) {
            const uint32_t count = min(left, F::kPieceChunks);
            const SharedAddress full = memory.full(ring.at);
            wait_for_phase(memory.empty(ring.at), ring.parity ^ 1);
            for (uint32_t i = 0; i < count; ++i) {
                copy_by_engine(memory.tokens(ring.at) + i * item.chunk_bytes(), from, bytes, full);
                from += bytes;
            }
            if (is_first) memory.write_item(ring.at, item);
            arrive_expecting(full, count * bytes);
            ring.advance();
            left -= count;
            if (step < 2) look_up(step++, next_number);
        }
        while (step < 2) look_up(step++, next_number);
    }

    __device__ __forceinline__ void run() {
        uint32_t number = blockIdx.x;
        for (uint32_t step = 0; step < 2; ++step) look_up(step, number);
        for (item = next; item.count > 0; item = next) bring_item(number += gridDim.x);
        wait_for_phase(memory.empty(ring.at), ring.parity ^ 1);
        memory.write_item(ring.at, item);
        arrive(memory.full(ring.at));
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The others

// 1 / (1 + 2^x), within 2^-21 of it.
__device__ __forceinline__ float fraction_of_power(float x) {
#ifdef CANDLE_MOE_EMULATOR
    return 1.0f / (1.0f + exp2f(x));
#else
    float power, fraction;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(fraction) : "f"(1.0f + power));
    return fraction;
#endif
}

// As activate(), with the device's quick exponential and inverse, since the result is rounded to one part in 2^8 or 2^11.
__device__ __forceinline__ float activate_nearly(const ProjectionArguments& a, float gate, float up) {
    constexpr float kLog2E = 1.4426950408889634f;
    if (a.activation == kSilu) return gate * fraction_of_power(gate * -kLog2E) * up;
    gate = gate > a.limit ? a.limit : gate;
    up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
    return gate * fraction_of_power(gate * (a.alpha * -kLog2E)) * (up + 1.0f);
}

template <typename F, typename S, typename Row>
struct Worker {
    using T = typename F::Element;

    const LayerArguments& a;
    const Memory<F, S>& memory;
    const uint32_t warp, lane;
    const SharedAddress values, scales;  // of this lane, of the first chunk in the first slot
    RingPosition<S::kStages> ring;
    RingPosition<F::kSlots> pieces;
    uint32_t before;  // a stage that is free when the products before the last ones are done

    __device__ __forceinline__ Worker(const LayerArguments& arguments, const Memory<F, S>& shared)
        : a(arguments), memory(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
          values(shared.piece(0) + warp * (F::kPieceChunks * F::kValueBytes) + lane * 16),
          scales(shared.piece(0) + Memory<F, S>::kPieceValues + warp * (F::kPieceChunks * F::kScaleBytes) + lane / 4 * 4) {}

    __device__ __forceinline__ void free_stage() {
        if (before < S::kStages && lane == 0) arrive(memory.empty(before));
        before = S::kStages;
    }

    template <int kColumns>
    static __device__ __forceinline__ void multiply_steps(
        float (&sums)[S::kSums], const uint32_t (&weights)[kChunkSteps][4], SharedAddress tokens) {
        begin_multiplies();
#pragma unroll
        for (int s = 0; s < kChunkSteps; ++s) multiply<T, kColumns>(sums, weights[s], tokens, s);
        end_multiplies();
    }

    // Branches that all threads take together, of which kLeast to kMost columns are left: loops for each number of columns would
    // not share registers.
    template <uint32_t kLeast = S::kStep, uint32_t kMost = S::kPlaces>
    static __device__ __forceinline__ void multiply_columns(float (&sums)[S::kSums],
                                                            const uint32_t (&weights)[kChunkSteps][4], SharedAddress tokens,
                                                            uint32_t columns) {
        if constexpr (kLeast == kMost) {
            multiply_steps<kMost>(sums, weights, tokens);
        } else {
            constexpr uint32_t kMiddle = (kLeast + kMost) / (2 * S::kStep) * S::kStep;
            if (columns > kMiddle) return multiply_columns<kMiddle + S::kStep, kMost>(sums, weights, tokens, columns);
            multiply_columns<kLeast, kMiddle>(sums, weights, tokens, columns);
        }
    }

    // The products of all chunks of an item, a piece of weights and a stage of tokens at a time.
    __device__ __forceinline__ void multiply_pieces(float (&sums)[S::kSums], const TiledItem<S>& item, uint32_t left) {
        constexpr uint32_t kChunks = F::kPieceChunks;
        const uint32_t columns = uniform(item.columns()), chunk_bytes = columns * kSwizzledRowBytes;
        uint32_t weights[kChunks][kChunkSteps][4];
        before = S::kStages;
        for (; left > 0; left -= min(left, kChunks)) {
            wait_for_phase(memory.piece_full(pieces.at), pieces.parity);
            const SharedAddress piece = values + pieces.at * Memory<F, S>::kPieceBytes;
            const SharedAddress its_scales = scales + pieces.at * Memory<F, S>::kPieceBytes;
            const SharedAddress tokens = memory.tokens(uniform(ring.at));
            typename F::Raw raw[2];
            F::load(raw[0], piece, its_scales);
#pragma unroll
            for (uint32_t i = 0; i < kChunks; ++i) {
                if (i >= left) break;
                // The products that had these registers are done, and in the end those of the piece before this one.
                wait_for_multiplies<(kChunks > 1 ? kChunks - 1 : 0)>();
                if (i + 1 == kChunks) free_stage();
                F::decode(weights[i], raw[i % 2]);
                if (i + 1 < kChunks) F::load(raw[(i + 1) % 2], piece + (i + 1) * F::kValueBytes, its_scales + (i + 1) * F::kScaleBytes);
                if (i == 0) wait_for_phase(memory.full(ring.at), ring.parity);
                multiply_columns(sums, weights[i], tokens + i * chunk_bytes, columns);
            }
            if (left < kChunks) {
                wait_for_multiplies<0>();
                free_stage();
            }
            __syncwarp();
            if (lane == 0) arrive(memory.piece_empty(pieces.at));
            pieces.advance();
            before = ring.at;
            ring.advance();
        }
    }

    __device__ __forceinline__ void work_on(const TiledItem<S>& item) {
        float sums[S::kSums] = {};
        const ProjectionArguments& of = item.of(a);
        const TiledShape shape(of, item.is_down);
        const uint32_t band = item.band + warp;
        const bool is_in = band < shape.num_bands;
        // There before it is needed.
        const float2 bias = is_in ? bias_of(of, item.is_down ? kDown : kGateUp, item.expert, band) : make_float2(0.0f, 0.0f);
        multiply_pieces(sums, item, shape.chunks);
        wait_for_multiplies<0>();
        settle(sums);
        free_stage();
        if (!item.is_down) {
            if (is_in) keep_activated(item, band, bias, sums);
            show_to_engine();
            __syncwarp();
            if (lane == 0) add_release(done_of(a, item.tile));
        } else if (is_in) {
            keep_rows(item, band, bias, sums);
        }
    }

    // The bias of rows g and g + 8 of a band.
    __device__ __forceinline__ float2 bias_of(const ProjectionArguments& of, Kind kind, uint32_t expert, uint32_t band) const {
        if (of.bias == nullptr) return make_float2(0.0f, 0.0f);
        const uint32_t rows = (kind == kDown ? 1 : 2) * of.out_features;
        const float* const bias = of.bias + uint64_t(expert) * rows;
        const auto row = [&](uint32_t r) { return published_row(kind, of.gate_up_rows, rows, band, r); };
        return make_float2(bias[row(lane / 4)], bias[row(lane / 4 + 8)]);
    }

    // sums[4 j + i]: row g of the band, or g + 8 from i = 2 on; place 8 j + 2 t + i % 2 of the tile.
    __device__ __forceinline__ void keep_activated(
        const TiledItem<S>& item, uint32_t band, float2 bias, const float (&sums)[S::kSums]) const {
        const ProjectionArguments& of = a.gate_up;
        // A thread has one feature of two places, and keeps two features of one: the band's 8 are a piece of 16 bytes.
        const uint32_t row = lane / 4;
        unsigned char* to = static_cast<unsigned char*>(of.output) + tile_offset(item.first, of.out_features) +
                            uint64_t(band / 8) * (item.count * kSwizzledRowBytes) + swizzled(row, band % 8) + lane % 4 * 4;
#pragma unroll
        for (uint32_t j = 0; j < S::kSums / 4; ++j) {
            if (8 * j >= item.count) break;
            const float first = activate_nearly(of, sums[4 * j] + bias.x, sums[4 * j + 2] + bias.y);
            const float second = activate_nearly(of, sums[4 * j + 1] + bias.x, sums[4 * j + 3] + bias.y);
            const uint32_t pair = transpose_matrix(pair_of(first, second, static_cast<const T*>(nullptr)));
            if (8 * j + row < item.count) *reinterpret_cast<uint32_t*>(to) = pair;
            to += 8 * kSwizzledRowBytes;
        }
    }

    __device__ __forceinline__ void keep_rows(
        const TiledItem<S>& item, uint32_t band, float2 bias, const float (&sums)[S::kSums]) const {
        const ProjectionArguments& of = a.down;
        Row* to = static_cast<Row*>(of.output) + uint64_t(item.first + lane % 4 * 2) * of.out_features +
                  (band * kBandRows + lane / 4 * 2);
#pragma unroll
        for (uint32_t j = 0; j < S::kSums / 4; ++j) {
            if (8 * j >= item.count) break;
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                if (8 * j + lane % 4 * 2 + i >= item.count) continue;
                keep_both(to + i * of.out_features, sums[4 * j + i] + bias.x, sums[4 * j + 2 + i] + bias.y);
            }
            to += uint64_t(8) * of.out_features;
        }
    }

    __device__ __forceinline__ void run() {
        for (;;) {
            wait_for_phase(memory.full(ring.at), ring.parity);
            const TiledItem<S> item = memory.read_item(ring.at);
            if (item.count == 0) return;
            work_on(item);
        }
    }
};

template <typename F, typename S, typename Row>
__device__ __forceinline__ void run_tiles(const LayerArguments& a) {
    const Memory<F, S> memory = {aligned_shared()};
    memory.start_barriers(threadIdx.x);
    wait_for_previous_kernel();
    // Not before: experts/home.cu relies on it.
    allow_next_kernel();
    const uint32_t num_tiles = count_tiles(a.gate_up);  // and a barrier of the block
    if (threadIdx.x < kTiledWorkers) {
        take_registers<S::kWorkerRegisters>();
        Worker<F, S, Row>(a, memory).run();
        return;
    }
    leave_registers<S::kProducerRegisters>();
    if (threadIdx.x % 32 != 0) return;
    const uint32_t warp = (threadIdx.x - kTiledWorkers) / 32;
    if (warp < kWeightWarps) {
        WeightsProducer<F, S>(a, memory, warp, num_tiles).run();
    } else {
        TokensProducer<F, S>(a, memory, num_tiles).run();
    }
}

#endif

}  // namespace moe
