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
constexpr uint32_t kUnitBytes = 512;  // of 16 bytes for each lane

#ifdef MOE_HOPPER

// ------------------------------------------------------------------------------------------------------------------
// Formats: what a stage has of a band, and the A operands that it gives

struct TiledMxFp4 {
    using Element = __nv_bfloat16;
    static constexpr uint32_t kStages = 10;
    static constexpr uint32_t kUnits = 1;
    static constexpr uint32_t kScaleBytes = 32;

    // `values` is where this lane's are, and `scales` too.
    static __device__ __forceinline__ void load(uint32_t (&a)[kStageSteps][4], SharedAddress values, SharedAddress scales) {
        const uint4 words = load_shared_16(values);
        const uint32_t scale = load_shared_4(scales);
        const uint32_t word[kStageSteps] = {words.x, words.y, words.z, words.w};
        // Of rows g and g + 8, in columns 0..32, then in columns 32..64.
        uint32_t powers[4];
        pairs_of_scales(scale, powers);
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

    static __device__ __forceinline__ void load(uint32_t (&a)[kStageSteps][4], SharedAddress values, SharedAddress) {
#pragma unroll
        for (int s = 0; s < kStageSteps; ++s) {
            const uint4 words = load_shared_16(values + s * kUnitBytes);
            a[s][0] = words.x;
            a[s][1] = words.y;
            a[s][2] = words.z;
            a[s][3] = words.w;
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The ring

// Some rows of an expert's matrix by some of its places. 0 places: there are no more items.
struct TiledItem {
    uint32_t expert, first, count;  // as in Tile
    uint32_t band;                  // the first of the row block
};

// The shared memory of a block: tokens, weights and barriers of each stage, and the item whose first stage it is.
template <typename F>
struct Stages {
    static constexpr uint32_t kValueBytes = kBlockBands * F::kUnits * kUnitBytes;
    static constexpr uint32_t kWeightBytes = kValueBytes + kBlockBands * F::kScaleBytes;
    static constexpr uint32_t kWeights = F::kStages * kTokenBytes;
    static constexpr uint32_t kItems = kWeights + F::kStages * kWeightBytes;
    static constexpr uint32_t kFull = kItems + F::kStages * sizeof(TiledItem);
    static constexpr uint32_t kEmpty = kFull + F::kStages * kBarrierBytes;
    static constexpr uint32_t kEnd = kEmpty + F::kStages * kBarrierBytes;
    static constexpr uint32_t kBytes = (kEnd + kSwizzleAlignment - 1) / kSwizzleAlignment * kSwizzleAlignment;

    SharedAddress start;

    __device__ __forceinline__ SharedAddress tokens(uint32_t stage) const { return start + stage * kTokenBytes; }
    __device__ __forceinline__ SharedAddress values(uint32_t stage) const { return start + (kWeights + stage * kWeightBytes); }
    __device__ __forceinline__ SharedAddress item(uint32_t stage) const {
        return start + (kItems + stage * uint32_t(sizeof(TiledItem)));
    }
    __device__ __forceinline__ SharedAddress full(uint32_t stage) const { return start + (kFull + stage * kBarrierBytes); }
    __device__ __forceinline__ SharedAddress empty(uint32_t stage) const { return start + (kEmpty + stage * kBarrierBytes); }
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
    static constexpr uint32_t kRowsAtOnce = kWarpgroup / 8;  // a row of a stage is 8 pieces
    static constexpr uint32_t kRows = kTileTokens / kRowsAtOnce;
    static constexpr uint32_t kBands = kBlockBands / 4;  // of a warp
    static constexpr uint32_t kScalePieces = F::kScaleBytes * kBlockBands / 16;

    const ProjectionArguments& a;
    const Stages<F>& stages;
    const uint32_t thread, num_bands, item_stages, band_bytes;
    RingPosition<F> at;

    // Of an item: what this thread copies.
    TiledItem item;
    uint32_t rows[kRows];  // of the input
    const unsigned char* values[kBands];
    const unsigned char* scales;
    // Of the next one.
    TiledItem next;
    uint32_t next_slots[kRows];

    __device__ __forceinline__ Producer(const ProjectionArguments& arguments, const Stages<F>& ring, uint32_t bands)
        : a(arguments), stages(ring), thread(threadIdx.x % kWarpgroup), num_bands(bands),
          item_stages(arguments.in_features / kStageColumns), band_bytes(item_stages * (F::kUnits * kUnitBytes)) {}

    // Looks up item `number`, in three steps of which each needs what the one before it has loaded.
    __device__ __forceinline__ void look_up(uint32_t step, uint32_t number) {
        if (step == 0) {
            const uint32_t row_blocks = (num_bands + kBlockBands - 1) / kBlockBands;
            const uint32_t tile = number / row_blocks;
            const bool in = tile < a.max_tiles;
            next.expert = in ? a.tile_experts[tile] : kNothing;
            next.first = in ? a.tile_starts[tile] : 0;
            next.band = number % row_blocks * kBlockBands;
        } else if (step == 1) {
            next.count = next.expert == kNothing ? 0 : min(kTileTokens, a.expert_offsets[next.expert + 1] - next.first);
        } else if (kKind == kGateUp && step == 2 && next.count > 0) {
#pragma unroll
            for (uint32_t i = 0; i < kRows; ++i) next_slots[i] = a.sorted_slots[next.first + place_of(next, i)];
        }
    }

    // The places of this thread: that of its number / 8, and every 16th from there on. The last one stands for those behind it.
    __device__ __forceinline__ uint32_t place_of(const TiledItem& of, uint32_t i) const {
        return min(thread / 8 + i * kRowsAtOnce, of.count - 1);
    }

    // Goes on to what was looked up. The weights of a warp are every fourth band; the last band stands for those behind it.
    __device__ __forceinline__ void take_next() {
        item = next;
        if (item.count == 0) return;
        const uint64_t first_band = uint64_t(item.expert) * num_bands;
#pragma unroll
        for (uint32_t i = 0; i < kBands; ++i) {
            const uint32_t band = min(item.band + thread / 32 + i * 4, num_bands - 1);
            values[i] = static_cast<const unsigned char*>(a.weights) + (first_band + band) * band_bytes + thread % 32 * 16;
        }
        if (copies_scales()) {
            const uint32_t band = min(item.band + thread * 16 / 32, num_bands - 1);
            scales = static_cast<const unsigned char*>(a.scales) + (first_band + band) * item_stages * 32 + thread % 2 * 16;
        }
    }

    __device__ __forceinline__ bool copies_scales() const {
        if constexpr (kScalePieces > 0) return thread < kScalePieces;
        return false;
    }

    __device__ __forceinline__ void find_rows() {
#pragma unroll
        for (uint32_t i = 0; i < kRows; ++i) {
            rows[i] = kKind == kGateUp ? next_slots[i] / a.top_k : item.first + place_of(item, i);
        }
    }

    // The weights of the next 64 columns.
    __device__ __forceinline__ void copy_weights(uint32_t stage) {
        const SharedAddress to = stages.values(stage) + thread / 32 * (F::kUnits * kUnitBytes) + thread % 32 * 16;
#pragma unroll
        for (uint32_t i = 0; i < kBands; ++i) {
#pragma unroll
            for (uint32_t u = 0; u < F::kUnits; ++u) {
                copy_16(to + (i * 4 * F::kUnits + u) * kUnitBytes, values[i] + u * kUnitBytes);
            }
            values[i] += F::kUnits * kUnitBytes;
        }
        if (copies_scales()) {
            copy_16(stages.values(stage) + (Stages<F>::kValueBytes + thread * 16), scales);
            scales += 32;
        }
    }

    template <uint32_t kFirst, uint32_t kEnd>
    __device__ __forceinline__ void copy_rows(const void* from, SharedAddress to) const {
#pragma unroll
        for (uint32_t i = kFirst; i < kEnd; ++i) {
            copy_16(to + i * (kRowsAtOnce * kSwizzledRowBytes), element_at(from, rows[i], a.in_features * 2));
        }
    }

    // Columns 64 k .. 64 k + 64 of the tokens.
    __device__ __forceinline__ void copy_tokens(uint32_t k, uint32_t stage) const {
        const unsigned char* const from = static_cast<const unsigned char*>(a.input) + k * 128 + thread % 8 * 16;
        const SharedAddress to = stages.tokens(stage) + swizzled(thread / 8, thread % 8);
        copy_rows<0, 1>(from, to);
        if (item.count <= 16) return;
        copy_rows<1, 2>(from, to);
        if (item.count <= 32) return;
        copy_rows<2, 4>(from, to);
        if (item.count <= 64) return;
        copy_rows<4, 6>(from, to);
        if (item.count <= 96) return;
        copy_rows<6, 8>(from, to);
    }

    // Says that all copies of the stage have begun, and what it is the first stage of.
    __device__ __forceinline__ void announce(uint32_t k) {
        const SharedAddress full = stages.full(at.stage);
        arrive_with_copies(full);
        if (thread == 0) {
            if (k == 0) write_16(stages.item(at.stage), make_uint4(item.expert, item.first, item.count, item.band));
            arrive(full);
        }
        at.advance();
    }

    __device__ __forceinline__ void run() {
        if (kKind == kGateUp) wait_for_previous_kernel();
        uint32_t number = blockIdx.x, ahead = 0;
        for (uint32_t step = 0; step < 3; ++step) look_up(step, number);
        take_next();
        if (kKind == kDown) {
            // The order was complete before the kernel in front of `down` began, its input is not.
            if (item.count > 0) ahead = min(F::kStages, item_stages);
            for (uint32_t k = 0; k < ahead; ++k) copy_weights(k);
            wait_for_previous_kernel();
        }
        allow_next_kernel();
        while (item.count > 0) {
            find_rows();
            number += gridDim.x;
            for (uint32_t k = 0; k < item_stages; ++k) {
                wait_for_phase(stages.empty(at.stage), at.parity ^ 1);
                if (k >= ahead) copy_weights(at.stage);
                copy_tokens(k, at.stage);
                announce(k);
                if (k < 3) look_up(k, number);
            }
            for (uint32_t step = item_stages; step < 3; ++step) look_up(step, number);
            ahead = 0;
            take_next();
        }
        wait_for_phase(stages.empty(at.stage), at.parity ^ 1);
        announce(0);
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

// As activate(), with the device's quick exponential and inverse, since the result is rounded to 2^-9 or 2^-12.
__device__ __forceinline__ float activate_nearly(const ProjectionArguments& a, float gate, float up) {
    constexpr float kLog2E = 1.4426950408889634f;
    if (a.activation == kSilu) return gate * fraction_of_power(gate * -kLog2E) * up;
    gate = gate > a.limit ? a.limit : gate;
    up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
    return gate * fraction_of_power(gate * (a.alpha * -kLog2E)) * (up + 1.0f);
}

template <typename F, Kind kKind>
struct Worker {
    using T = typename F::Element;

    const ProjectionArguments& a;
    const Stages<F>& stages;
    const uint32_t warp, lane, num_bands;
    const SharedAddress values, scales;  // of this lane in the first stage
    RingPosition<F> at;

    __device__ __forceinline__ Worker(const ProjectionArguments& arguments, const Stages<F>& ring, uint32_t bands)
        : a(arguments), stages(ring), warp(threadIdx.x / 32), lane(threadIdx.x % 32), num_bands(bands),
          values(ring.values(0) + warp * (F::kUnits * kUnitBytes) + lane * 16),
          scales(ring.values(0) + Stages<F>::kValueBytes + warp * F::kScaleBytes + lane / 4 * 4) {}

    // A branch that all threads take together is cheaper than loops for each number of columns, which would not share registers.
    __device__ __forceinline__ void multiply_columns(float (&sums)[kMostSums], const uint32_t (&weights)[kStageSteps][4],
                                                     SharedAddress tokens, uint32_t sixteens) {
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
                                                          SharedAddress tokens) {
        begin_multiplies();
#pragma unroll
        for (int s = 0; s < kStageSteps; ++s) multiply<T, kColumns>(sums, weights[s], tokens, s);
        end_multiplies();
    }

    // Takes the weights of the next stage and starts its products; frees the stage before it.
    __device__ __forceinline__ void multiply_stage(float (&sums)[kMostSums], uint32_t (&weights)[kStageSteps][4],
                                                   uint32_t sixteens, uint32_t& before) {
        wait_for_phase(stages.full(at.stage), at.parity);
        const uint32_t offset = at.stage * Stages<F>::kWeightBytes;
        F::load(weights, values + offset, scales + offset);
        show_to_multiplies();
        multiply_columns(sums, weights, stages.tokens(at.stage), sixteens);
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
            const uint4 words = load_shared_16(stages.item(at.stage));
            const TiledItem item = {words.x, words.y, words.z, words.w};
            if (item.count == 0) return;
            multiply_item(item);
        }
    }
};

template <typename F, Kind kKind>
__device__ __forceinline__ void project_tiles(const ProjectionArguments& a) {
    const Stages<F> stages = {aligned_shared()};
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

#endif

}  // namespace moe
