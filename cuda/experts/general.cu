// The experts' projections for weights of any format and any size.
//
//     gate_up   h[place]    = round(activation(W1 x + b1)), of the token at each place of the order
//     down      rows[place] = W2 h[place] + b2
//     linear    out[token]  = round(W x + b), of one matrix and all tokens in their order
//
// A block has up to kTileRows places of one expert and a band of output features; a warp has one feature at a time, its
// lanes side by side along the inputs, so that a weight is decoded once for all places of the tile. Made to be right for
// every shape and not to be fast: faster kernels stand in front of it for the shapes that they take.

#include <type_traits>

#include "experts/fragments.cuh"

namespace moe {

constexpr uint32_t kTileRows = 16;
constexpr uint32_t kThreads = 256;
constexpr uint32_t kBand = 32;  // output features of a block

__device__ __forceinline__ float e2m1(uint32_t nibble) {
    const uint32_t exponent = nibble >> 1 & 3u, mantissa = nibble & 1u;
    // 0 and 0.5, or 1.m times a power of two.
    const float magnitude = exponent == 0 ? 0.5f * mantissa : __uint_as_float((exponent + 126u) << 23 | mantissa << 22);
    return nibble & 8u ? -magnitude : magnitude;
}

// Formats: the weight at column k of a row of the matrix, which is row `row` of all local experts' matrices.
template <typename T> struct Dense {
    const T* weights;
    __device__ Dense(const ProjectionArguments& a, uint64_t row)
        : weights(static_cast<const T*>(a.weights) + row * a.in_features) {}
    __device__ float at(uint32_t k) const { return to_float(weights[k]); }
};

// E2M1 in nibbles, low one first, with a power of two for 32 values.
struct Mxfp4 {
    const uint8_t* blocks;
    const uint8_t* scales;
    __device__ Mxfp4(const ProjectionArguments& a, uint64_t row)
        : blocks(static_cast<const uint8_t*>(a.weights) + row * (a.in_features / 2)),
          scales(static_cast<const uint8_t*>(a.scales) + row * (a.in_features / 32)) {}
    __device__ float at(uint32_t k) const {
        return e2m1(blocks[k / 2] >> (k % 2 * 4) & 15u) * power_of_scale(scales[k / 32]);
    }
};

// E4M3 bytes with a float for 128 values of a row.
struct Fp8 {
    const uint8_t* values;
    const float* scales;
    __device__ Fp8(const ProjectionArguments& a, uint64_t row)
        : values(static_cast<const uint8_t*>(a.weights) + row * a.in_features),
          scales(static_cast<const float*>(a.scales) + row * ((a.in_features + 127) / 128)) {}
    __device__ float at(uint32_t k) const {
        const uint32_t bits = values[k], exponent = bits >> 3 & 15u, mantissa = bits & 7u;
        const float magnitude =
            exponent == 0 ? mantissa * 0.001953125f : __uint_as_float((exponent + 120u) << 23 | mantissa << 20);
        return __fmul_rn(bits & 128u ? -magnitude : magnitude, scales[k / 128]);
    }
};

// The places of a block: rows of the input, by place of the tile.
template <Kind kKind>
__device__ __forceinline__ Tile block_tile(const ProjectionArguments& a, uint32_t tile) {
    if (kKind == kLinear) return {0, tile * kTileRows, min(kTileRows, a.num_rows - tile * kTileRows)};
    return tile_of(a, tile, kTileRows);
}

// The place of a row in fragment order.
template <Kind kKind>
struct FragmentRow {
    uint64_t band;  // of all experts'
    uint32_t g, half;

    __device__ FragmentRow(const ProjectionArguments& a, uint64_t row) {
        const uint32_t rows = kKind == kGateUp ? 2 * a.out_features : a.out_features;
        const uint32_t in_matrix = static_cast<uint32_t>(row % rows);
        // The row of the bands that it lies in: the other way than published_row.
        uint32_t in_bands = in_matrix / kBandRows * kBandRows + in_matrix % 2 * 8 + in_matrix % kBandRows / 2;
        if (kKind == kGateUp) {
            const bool interleaved = a.gate_up_rows == kInterleaved;
            const uint32_t feature = interleaved ? in_matrix / 2 : in_matrix % a.out_features;
            const uint32_t is_up = interleaved ? in_matrix % 2 : in_matrix / a.out_features;
            in_bands = feature / 8 * kBandRows + is_up * 8 + feature % 8;
        }
        band = row / rows * (rows / kBandRows) + in_bands / kBandRows;
        g = in_bands % 8;
        half = in_bands / 8 % 2;
    }
    __device__ uint32_t lane(uint32_t k) const { return g * 4 + k % 8 / 2; }
    __device__ uint32_t operand(uint32_t k) const { return half + k % 16 / 8 * 2; }
};

template <Kind kKind> struct Mxfp4Fragments : FragmentRow<kKind> {
    const uint32_t* values;
    const uint8_t* scales;
    __device__ Mxfp4Fragments(const ProjectionArguments& a, uint64_t row) : FragmentRow<kKind>(a, row) {
        const uint64_t unit = this->band * (a.in_features / kUnitColumns);
        values = static_cast<const uint32_t*>(a.weights) + unit * 32 * kSteps;
        scales = static_cast<const uint8_t*>(a.scales) + (unit * 8 + this->g) * 4;
    }
    __device__ float at(uint32_t k) const {
        const uint32_t unit = k / kUnitColumns, step = k % kUnitColumns / 16;
        const uint32_t word = values[(uint64_t(unit) * 32 + this->lane(k)) * kSteps + step];
        const uint32_t nibble = MxFp4::nibble(word, this->operand(k), k % 2);
        return e2m1(nibble) * power_of_scale(scales[unit * 32 + step / 2 * 2 + this->half]);
    }
};

template <typename T, Kind kKind> struct PlainFragments : FragmentRow<kKind> {
    const T* values;
    __device__ PlainFragments(const ProjectionArguments& a, uint64_t row) : FragmentRow<kKind>(a, row) {
        values = static_cast<const T*>(a.weights) + this->band * (a.in_features * uint64_t(kBandRows));
    }
    __device__ float at(uint32_t k) const {
        return to_float(values[(uint64_t(k / 16) * 32 + this->lane(k)) * 8 + this->operand(k) * 2 + k % 2]);
    }
};

// The products of a row of the matrix with all inputs of the tile; lane t has that of input t, bias included.
template <typename W, typename T>
__device__ __forceinline__ float dot(const ProjectionArguments& a, uint32_t expert, uint32_t matrix_rows, uint32_t row,
                                     const uint32_t* inputs, uint32_t lane) {
    const uint64_t in_all = uint64_t(expert) * matrix_rows + row;
    const W weights(a, in_all);
    const T* const input = static_cast<const T*>(a.input);
    float sums[kTileRows] = {};
    for (uint32_t k = lane; k < a.in_features; k += 32) {
        const float weight = weights.at(k);
#pragma unroll
        for (uint32_t t = 0; t < kTileRows; ++t) {
            sums[t] = fmaf(weight, to_float(input[uint64_t(inputs[t]) * a.in_features + k]), sums[t]);
        }
    }
    float mine = 0.0f;
#pragma unroll
    for (uint32_t t = 0; t < kTileRows; ++t) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sums[t] += __shfl_xor_sync(kAllLanes, sums[t], d);
        if (lane == t) mine = sums[t];
    }
    return mine + (a.bias == nullptr ? 0.0f : a.bias[in_all]);
}

template <typename W, typename T, Kind kKind>
__device__ __forceinline__ void project(const ProjectionArguments& a) {
    __shared__ uint32_t inputs[kTileRows];
    const uint32_t num_bands = (a.out_features + kBand - 1) / kBand;
    const Tile tile = block_tile<kKind>(a, blockIdx.x / num_bands);
    if (tile.count == 0) return;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x < kTileRows) {
        // Rows that the tile lacks repeat its last one, and are not kept.
        const uint32_t place = tile.first + min(threadIdx.x, tile.count - 1);
        inputs[threadIdx.x] = kKind == kGateUp ? a.sorted_slots[place] / a.top_k : place;
    }
    __syncthreads();
    const uint32_t first = blockIdx.x % num_bands * kBand;
    for (uint32_t j = first + warp; j < min(first + kBand, a.out_features); j += kThreads / 32) {
        const uint64_t to = uint64_t(tile.first + lane) * a.out_features + j;
        if constexpr (kKind == kGateUp) {
            const uint32_t matrix_rows = 2 * a.out_features;
            const bool interleaved = a.gate_up_rows == kInterleaved;
            const float gate = dot<W, T>(a, tile.expert, matrix_rows, interleaved ? 2 * j : j, inputs, lane);
            const float up =
                dot<W, T>(a, tile.expert, matrix_rows, interleaved ? 2 * j + 1 : a.out_features + j, inputs, lane);
            if (lane < tile.count) keep(static_cast<T*>(a.output) + to, activate(a, gate, up));
        } else {
            const float out = dot<W, T>(a, tile.expert, a.out_features, j, inputs, lane);
            using Out = std::conditional_t<kKind == kLinear, T, float>;
            if (lane < tile.count) keep(static_cast<Out*>(a.output) + to, out);
        }
    }
}

}  // namespace moe

#define PROJECT(WEIGHTS, WEIGHTS_NAME, T, NAME, KIND, KIND_NAME)                                                  \
    extern "C" __global__ void __launch_bounds__(moe::kThreads) KIND_NAME##_##WEIGHTS_NAME##_##NAME(              \
        const __grid_constant__ moe::ProjectionArguments a) {                                                     \
        moe::project<WEIGHTS, T, moe::KIND>(a);                                                              \
    }
#define PROJECT_KINDS(WEIGHTS, WEIGHTS_NAME, T, NAME)          \
    PROJECT(WEIGHTS, WEIGHTS_NAME, T, NAME, kGateUp, gate_up)  \
    PROJECT(WEIGHTS, WEIGHTS_NAME, T, NAME, kDown, down)       \
    PROJECT(WEIGHTS, WEIGHTS_NAME, T, NAME, kLinear, linear)
#define PROJECT_FRAGMENTS(T, NAME, KIND, KIND_NAME)                                                           \
    PROJECT(moe::Mxfp4Fragments<moe::KIND>, mxfp4_fragments, T, NAME, KIND, KIND_NAME)                        \
    PROJECT(PLAIN(__half, KIND), f16_fragments, T, NAME, KIND, KIND_NAME)                                     \
    PROJECT(PLAIN(__nv_bfloat16, KIND), bf16_fragments, T, NAME, KIND, KIND_NAME)
#define PLAIN(W, KIND) moe::PlainFragments<W, moe::KIND>
#define PROJECT_FORMATS(T, NAME)                               \
    PROJECT_KINDS(moe::Dense<float>, f32, T, NAME)             \
    PROJECT_KINDS(moe::Dense<__half>, f16, T, NAME)            \
    PROJECT_KINDS(moe::Dense<__nv_bfloat16>, bf16, T, NAME)    \
    PROJECT_KINDS(moe::Mxfp4, mxfp4, T, NAME)                  \
    PROJECT_KINDS(moe::Fp8, fp8, T, NAME)                      \
    PROJECT_FRAGMENTS(T, NAME, kGateUp, gate_up)               \
    PROJECT_FRAGMENTS(T, NAME, kDown, down)

PROJECT_FORMATS(float, f32)
PROJECT_FORMATS(__half, f16)
PROJECT_FORMATS(__nv_bfloat16, bf16)
