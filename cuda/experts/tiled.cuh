// The experts' projections for many tokens, on the tensor cores of compute capability 9.0.
//
//     gate_up   h[place]    = round(activation(W1 x + b1)), of the token at each place of the order
//     down      rows[place] = W2 h[place] + b2, in float32
//
// An item of work is 192 rows of an expert's matrix (12 bands) by a tile of up to 128 places. As many blocks as
// multiprocessors take items in turn: block b has items b, b + blocks, ..; the row blocks of a tile follow each other, and the
// tiles of an expert, so that its weights come from device memory once and its tokens stay in the L2 cache.
//
// A block is four warpgroups that a ring of stages of 64 columns connects:
//
//     producer   waits until a stage is free, starts the copies of its weights (in order, 512 bytes a warp) and tokens (16
//                bytes a thread, gathered, swizzled; zeros behind the last place), and goes on to the next stage
//     3 others   each has 64 rows, each warp of it a band; they take weights from the stage to registers, make 16-bit floats of
//                them, and multiply them with the tokens of the stage (wgmma) while the next ones are made
//
// 1. Weights are the A operand, so that their decoded form never sees shared memory, and tokens the B operand, whose number is
//    any multiple of 16: a short tile costs what it has.
// 2. The copies of a stage are under way while up to kStages - 1 others are; no thread waits for them but those that need them.
// 3. `down` brings the weights of its first stages while the kernel before it still runs.
//
// Limits: in_features is a multiple of 64, the matrix has a multiple of 16 rows; MXFP4 scales are at most 128.
// Launch: kTiledThreads threads, tiled_shared_bytes<F>() bytes of dynamic shared memory, a block for each multiprocessor.
#pragma once

#include <type_traits>

#include "common/hopper.cuh"
#include "experts/fragments.cuh"

namespace moe {

constexpr uint32_t kTileTokens = 128;
constexpr uint32_t kTiledWorkers = 3 * kWarpgroup;
constexpr uint32_t kTiledThreads = kTiledWorkers + kWarpgroup;
constexpr uint32_t kBlockBands = kTiledWorkers / 32;
constexpr uint32_t kStageColumns = 64;
constexpr int kStageSteps = kStageColumns / 16;
constexpr uint32_t kTokenBytes = kTileTokens * kSwizzledRowBytes;  // of a stage
constexpr uint32_t kUnitBytes = kUnitLanes * 16;

// ------------------------------------------------------------------------------------------------------------------
// Formats: what a stage has of a band, and the A operands that it gives

struct TiledMxFp4 {
    using Element = __nv_bfloat16;
    static constexpr uint32_t kStages = 10;
    static constexpr uint32_t kUnits = 1;
    static constexpr uint32_t kScaleBytes = 32;

    static __device__ __forceinline__ void load(
        uint32_t (&a)[kStageSteps][4], const uint4* values, const uint32_t* scales, uint32_t lane) {
        const uint4 words = values[lane];
        const uint32_t scale = scales[lane / 4];
        const uint32_t word[kStageSteps] = {words.x, words.y, words.z, words.w};
        // Of rows g and g + 8, in columns 0..32, then in columns 32..64.
        uint32_t powers[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) powers[i] = pair_of_scale(scale >> (8 * i) & 0xffu);
#pragma unroll
        for (int s = 0; s < kStageSteps; ++s) {
            MxFp4::raw_operands(word[s], a[s]);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[s][i] = multiply_pairs(a[s][i], powers[s / 2 * 2 + i % 2]);
        }
    }
};

template <typename T>
struct TiledDense {
    using Element = T;
    static constexpr uint32_t kStages = 5;
    static constexpr uint32_t kUnits = 4;
    static constexpr uint32_t kScaleBytes = 0;

    static __device__ __forceinline__ void load(
        uint32_t (&a)[kStageSteps][4], const uint4* values, const uint32_t*, uint32_t lane) {
#pragma unroll
        for (int s = 0; s < kStageSteps; ++s) {
            const uint4 words = values[s * kUnitLanes + lane];
            a[s][0] = words.x;
            a[s][1] = words.y;
            a[s][2] = words.z;
            a[s][3] = words.w;
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The ring

// What a stage is of: the item whose first stage it is. 0 places: there are no more items.
struct TiledItem {
    uint32_t expert, first, count;  // as in Tile
    uint32_t band;                  // the first of the row block
};

// The shared memory of a block.
template <typename F>
struct Stages {
    static constexpr uint32_t kValueBytes = kBlockBands * F::kUnits * kUnitBytes;
    static constexpr uint32_t kWeightBytes = kValueBytes + kBlockBands * F::kScaleBytes;
    static constexpr uint32_t kBytes =
        F::kStages * (kTokenBytes + kWeightBytes + sizeof(TiledItem) + 2 * sizeof(Barrier)) + kSwizzleAlignment;

    unsigned char* start;

    explicit __device__ __forceinline__ Stages(unsigned char* memory) {
#ifdef CANDLE_MOE_EMULATOR
        const auto at = reinterpret_cast<uintptr_t>(memory);
#else
        const uint32_t at = shared_address(memory);
#endif
        start = memory + (kSwizzleAlignment - at % kSwizzleAlignment) % kSwizzleAlignment;
    }
    __device__ __forceinline__ unsigned char* tokens(uint32_t stage) const { return start + stage * kTokenBytes; }
    __device__ __forceinline__ unsigned char* values(uint32_t stage) const {
        return start + F::kStages * kTokenBytes + stage * kWeightBytes;
    }
    __device__ __forceinline__ unsigned char* scales(uint32_t stage) const { return values(stage) + kValueBytes; }
    __device__ __forceinline__ TiledItem* item(uint32_t stage) const {
        return reinterpret_cast<TiledItem*>(start + F::kStages * (kTokenBytes + kWeightBytes)) + stage;
    }
    __device__ __forceinline__ Barrier* full(uint32_t stage) const {
        return reinterpret_cast<Barrier*>(item(F::kStages)) + stage;
    }
    __device__ __forceinline__ Barrier* empty(uint32_t stage) const { return full(F::kStages) + stage; }
};

template <typename F>
constexpr uint32_t tiled_shared_bytes() { return Stages<F>::kBytes; }

// Where a warp is in the ring, and the parity of the phase of its round.
template <typename F>
struct RingPosition {
    uint32_t stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == F::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The producer

template <typename F, Kind kKind>
struct Producer {
    using T = typename F::Element;
    static constexpr uint32_t kRowsAtOnce = kWarpgroup / 8;  // a row of a stage is 8 pieces
    static constexpr uint32_t kRows = kTileTokens / kRowsAtOnce;

    const ProjectionArguments& a;
    const Stages<F>& stages;
    const uint32_t thread, num_bands, num_units;
    RingPosition<F> at;
    uint32_t rows[kRows];  // of the input

    __device__ __forceinline__ Producer(const ProjectionArguments& arguments, const Stages<F>& ring, uint32_t bands)
        : a(arguments), stages(ring), thread(threadIdx.x % kWarpgroup), num_bands(bands),
          num_units(arguments.in_features / kStageColumns * F::kUnits) {}

    __device__ __forceinline__ TiledItem item_of(uint32_t item) const {
        const uint32_t row_blocks = (num_bands + kBlockBands - 1) / kBlockBands;
        const uint32_t tile = item / row_blocks;
        if (tile >= a.max_tiles) return {0, 0, 0, 0};
        const Tile of = tile_of(a, tile, kTileTokens);
        return {of.expert, of.first, of.count, item % row_blocks * kBlockBands};
    }

    // The rows of this thread: those of its number / 8, and every 16th from there on.
    __device__ __forceinline__ void find_rows(const TiledItem& item) {
#pragma unroll
        for (uint32_t i = 0; i < kRows; ++i) {
            const uint32_t place = item.first + min(thread / 8 + i * kRowsAtOnce, item.count - 1);
            rows[i] = kKind == kGateUp ? a.sorted_slots[place] / a.top_k : place;
        }
    }

    // The weights of columns 64 k .. 64 k + 64: a warp copies the units of every fourth band.
    __device__ __forceinline__ void copy_weights(const TiledItem& item, uint32_t k, uint32_t stage) const {
        const uint64_t first_unit = (uint64_t(item.expert) * num_bands + item.band) * num_units + k * F::kUnits;
        const uint32_t lane = thread % 32;
        const auto* const values = static_cast<const unsigned char*>(a.weights) + first_unit * kUnitBytes + lane * 16;
#pragma unroll
        for (uint32_t i = 0; i < kBlockBands / 4; ++i) {
            const uint32_t band = thread / 32 + i * 4;
            if (item.band + band >= num_bands) break;
#pragma unroll
            for (uint32_t u = 0; u < F::kUnits; ++u) {
                copy_16(stages.values(stage) + (band * F::kUnits + u) * kUnitBytes + lane * 16,
                        values + (uint64_t(band) * num_units + u) * kUnitBytes);
            }
        }
        const uint32_t band = thread * 16 / 32;
        if (F::kScaleBytes > 0 && band < kBlockBands && item.band + band < num_bands) {
            const auto* const scales = static_cast<const unsigned char*>(a.scales);
            copy_16_of_line(stages.scales(stage) + thread * 16,
                            scales + (first_unit + uint64_t(band) * num_units) * 32 + thread % 2 * 16);
        }
    }

    __device__ __forceinline__ void copy_tokens(const TiledItem& item, uint32_t k, uint32_t stage) const {
        const T* const from = static_cast<const T*>(a.input) + k * kStageColumns + thread % 8 * 8;
        unsigned char* const to = stages.tokens(stage) + swizzled(thread / 8, thread % 8);
#pragma unroll
        for (uint32_t i = 0; i < kRows; ++i) {
            if (i * kRowsAtOnce >= item.count) break;
            copy_16(to + i * kRowsAtOnce * kSwizzledRowBytes, from + uint64_t(rows[i]) * a.in_features,
                    thread / 8 + i * kRowsAtOnce < item.count);
        }
    }

    // Says that all copies of the stage have begun, and what it is the first stage of.
    __device__ __forceinline__ void announce(const TiledItem& item) {
        arrive_with_copies(stages.full(at.stage));
        if (thread == 0) {
            *stages.item(at.stage) = item;
            arrive(stages.full(at.stage));
        }
        at.advance();
    }

    __device__ __forceinline__ void run() {
        if (kKind == kGateUp) wait_for_previous_kernel();
        const uint32_t item_stages = a.in_features / kStageColumns;
        uint32_t number = blockIdx.x;
        TiledItem item = item_of(number);
        // The order was complete before the kernel in front of `down` began, its input is not.
        uint32_t ahead = 0;
        if (kKind == kDown) {
            if (item.count > 0) ahead = min(F::kStages, item_stages);
            for (uint32_t k = 0; k < ahead; ++k) copy_weights(item, k, k);
            wait_for_previous_kernel();
        }
        allow_next_kernel();
        while (item.count > 0) {
            find_rows(item);
            for (uint32_t k = 0; k < item_stages; ++k) {
                wait_for_phase(stages.empty(at.stage), at.parity ^ 1);
                if (k >= ahead) copy_weights(item, k, at.stage);
                copy_tokens(item, k, at.stage);
                announce(item);
            }
            ahead = 0;
            number += gridDim.x;
            item = item_of(number);
        }
        wait_for_phase(stages.empty(at.stage), at.parity ^ 1);
        announce(item);
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The others

// As activate(), with the device's quick exponential and division: within 2^-20 of it, where results are rounded to 2^-9 or
// 2^-12.
__device__ __forceinline__ float activate_nearly(const ProjectionArguments& a, float gate, float up) {
    const bool silu = a.activation == kSilu;
    if (!silu) {
        gate = gate > a.limit ? a.limit : gate;
        up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
        up += 1.0f;
    }
    return __fdividef(gate, 1.0f + __expf(silu ? -gate : -a.alpha * gate)) * up;
}

template <typename F, Kind kKind>
struct Worker {
    using T = typename F::Element;

    const ProjectionArguments& a;
    const Stages<F>& stages;
    const uint32_t warp, lane, num_bands;
    RingPosition<F> at;

    __device__ __forceinline__ Worker(const ProjectionArguments& arguments, const Stages<F>& ring, uint32_t bands)
        : a(arguments), stages(ring), warp(threadIdx.x / 32), lane(threadIdx.x % 32), num_bands(bands) {}

    // A branch that all threads take together is cheaper than loops for each number of columns, which would not share registers.
    __device__ __forceinline__ void multiply_columns(float (&sums)[kMostSums], const uint32_t (&weights)[kStageSteps][4],
                                                     Operands tokens, uint32_t sixteens) {
        switch (sixteens) {
            case 1: return multiply_steps<16>(sums, weights, tokens);
            case 2: return multiply_steps<32>(sums, weights, tokens);
            case 3: return multiply_steps<48>(sums, weights, tokens);
            case 4: return multiply_steps<64>(sums, weights, tokens);
            case 5: return multiply_steps<80>(sums, weights, tokens);
            case 6: return multiply_steps<96>(sums, weights, tokens);
            case 7: return multiply_steps<112>(sums, weights, tokens);
            default: return multiply_steps<128>(sums, weights, tokens);
        }
    }

    template <int kColumns>
    static __device__ __forceinline__ void multiply_steps(float (&sums)[kMostSums], const uint32_t (&weights)[kStageSteps][4],
                                                          Operands tokens) {
        begin_multiplies();
#pragma unroll
        for (int s = 0; s < kStageSteps; ++s) multiply<T, kColumns>(sums, weights[s], tokens, s);
        end_multiplies();
    }

    // Takes the weights of the next stage and starts its products; frees the stage before it.
    __device__ __forceinline__ void multiply_stage(float (&sums)[kMostSums], uint32_t (&weights)[kStageSteps][4],
                                                   uint32_t sixteens, uint32_t& before) {
        wait_for_phase(stages.full(at.stage), at.parity);
        F::load(weights, reinterpret_cast<const uint4*>(stages.values(at.stage) + warp * F::kUnits * kUnitBytes),
                reinterpret_cast<const uint32_t*>(stages.scales(at.stage) + warp * F::kScaleBytes), lane);
        show_to_multiplies();
        multiply_columns(sums, weights, operands_at(stages.tokens(at.stage)), sixteens);
        wait_for_multiplies<1>();
        free_stage(before);
        before = at.stage;
        at.advance();
    }

    __device__ __forceinline__ void free_stage(uint32_t stage) const {
        if (stage < F::kStages && lane == 0) arrive(stages.empty(stage));
    }

    __device__ __forceinline__ void multiply_item(const TiledItem& item) {
        float sums[kMostSums] = {};
        uint32_t weights[2][kStageSteps][4];
        uint32_t before = F::kStages;
        const uint32_t sixteens = (item.count + 15) / 16;
        for (uint32_t left = a.in_features / kStageColumns; left > 0; left -= 2) {
            multiply_stage(sums, weights[0], sixteens, before);
            if (left == 1) break;
            multiply_stage(sums, weights[1], sixteens, before);
        }
        wait_for_multiplies<0>();
        settle(sums);
        free_stage(before);
        if (item.band + warp < num_bands) keep_sums(item, sums);
    }

    // sums[4 j + i]: row g of the band, or g + 8 from i = 2 on; place 8 j + 2 t + i % 2 of the tile.
    __device__ __forceinline__ void keep_sums(const TiledItem& item, const float (&sums)[kMostSums]) const {
        const uint32_t band = item.band + warp, g = lane / 4, t = lane % 4, rows = num_bands * kBandRows;
        float bias[2] = {};
        if (a.bias != nullptr) {
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t row = published_row(kKind, a.gate_up_rows, rows, band, g + 8 * i);
                bias[i] = a.bias[uint64_t(item.expert) * rows + row];
            }
        }
        using Out = std::conditional_t<kKind == kGateUp, T, float>;
        const uint32_t feature = kKind == kGateUp ? band * 8 + g : band * kBandRows + g;
        Out* const output = static_cast<Out*>(a.output) + uint64_t(item.first) * a.out_features + feature;
#pragma unroll
        for (uint32_t j = 0; j < kTileTokens / 8; ++j) {
            if (8 * j >= item.count) break;
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                const uint32_t place = 8 * j + 2 * t + i;
                if (place >= item.count) continue;
                Out* const to = output + uint64_t(place) * a.out_features;
                const float low = sums[4 * j + i] + bias[0], high = sums[4 * j + 2 + i] + bias[1];
                if constexpr (kKind == kGateUp) {
                    keep(to, activate_nearly(a, low, high));
                } else {
                    to[0] = low;
                    to[8] = high;
                }
            }
        }
    }

    __device__ __forceinline__ void run() {
        for (;;) {
            wait_for_phase(stages.full(at.stage), at.parity);
            const TiledItem item = *stages.item(at.stage);
            if (item.count == 0) return;
            multiply_item(item);
        }
    }
};

template <typename F, Kind kKind>
__device__ __forceinline__ void project_tiles(const ProjectionArguments& a) {
    MOE_DYNAMIC_SHARED(unsigned char, memory);
    const Stages<F> stages(memory);
    if (threadIdx.x < F::kStages) {
        start_barrier(stages.full(threadIdx.x), kWarpgroup + 1);
        start_barrier(stages.empty(threadIdx.x), kTiledWorkers / 32);
    }
    __syncthreads();
    const uint32_t num_bands = (kKind == kGateUp ? 2 : 1) * a.out_features / kBandRows;
    // 3 x 152 + 56 registers, which are the 512 for a thread of each warpgroup.
    if (threadIdx.x < kTiledWorkers) {
        take_registers<152>();
        Worker<F, kKind>(a, stages, num_bands).run();
    } else {
        leave_registers<56>();
        Producer<F, kKind>(a, stages, num_bands).run();
    }
}

}  // namespace moe
