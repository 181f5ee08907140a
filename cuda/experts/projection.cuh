// What every kernel of the experts' projections is told, and the arithmetic that they share.
//
//     gate_up   h[place]    = round(activation(W1 x + b1)), of the token at each place of the order
//     down      rows[place] = W2 h[place] + b2, in float32; experts/tiled.cuh may round
#pragma once

#include "common/keys.cuh"
#include "common/launch.cuh"
#include "common/neighbours.cuh"

namespace moe {

constexpr uint32_t kNothing = 0xffffffffu;

// What a matrix is: the parts of gate and up are taken together, or not.
enum Kind : uint32_t { kGateUp = 0, kDown = 1, kLinear = 2 };
// The parts of gate and up where they lie in the published matrix.
enum GateUpRows : uint32_t { kConcatenated = 0, kInterleaved = 1 };
enum Activation : uint32_t { kSilu = 0, kSwigluOss = 1 };

struct ProjectionArguments {
    const void* weights;            // [num_local, rows of the matrix, in_features], as the format holds it
    const void* scales;             // of the format, or null
    const float* bias;              // [num_local, rows of the matrix], or null
    const void* input;              // gate_up, linear: [num_tokens, in_features]; down: [num_slots, in_features];
                                    // experts/tiled.cuh has an order of its own for both
    void* output;                   // [num_slots, out_features]; linear: [num_tokens, out_features]
    const uint32_t* sorted_slots;
    const uint32_t* expert_offsets; // [num_local + 1]
    const uint32_t* tile_experts;   // [max_tiles], kNothing behind the last tile
    const uint32_t* tile_starts;    // [max_tiles]
    uint32_t num_rows;              // linear: num_tokens; otherwise num_slots
    uint32_t top_k;
    uint32_t in_features;
    uint32_t out_features;          // gate_up: intermediate_size, half the rows of the matrix
    uint32_t max_tiles;
    uint32_t gate_up_rows;
    uint32_t activation;
    float alpha;
    float limit;
    uint32_t parts;                 // experts/resident.cuh: of a band
    uint32_t rooms;                 // experts/resident.cuh: for the tokens of a tile
    uint32_t token_features;        // experts/resident.cuh: room for this many in a token's row
};

// What a kernel that takes a whole layer is told.
struct LayerArguments {
    ProjectionArguments gate_up, down;
    uint32_t* signals;  // [2, max_tiles]: what its blocks tell each other; 0 before and after a launch
};

// How many parts of a tile's h are there, and how often whoever waits for all of them has been done with that.
__device__ __forceinline__ uint32_t* done_of(const LayerArguments& a, uint32_t tile) { return a.signals + tile; }
__device__ __forceinline__ uint32_t* seen_of(const LayerArguments& a, uint32_t tile) {
    return a.signals + a.gate_up.max_tiles + tile;
}

// Two neighbours in one store; `to` is at an even index of an array that is aligned for it.
__device__ __forceinline__ uint32_t pair_of(float first, float second, const __half*) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pair_of(float first, float second, const __nv_bfloat16*) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <typename T>
__device__ __forceinline__ void keep_both(T* to, float first, float second) {
    *reinterpret_cast<uint32_t*>(to) = pair_of(first, second, to);
}
__device__ __forceinline__ void keep_both(float* to, float first, float second) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
}

// src/experts/activation.rs; NaN in either input comes out as NaN.
__device__ __forceinline__ float activate(const ProjectionArguments& a, float gate, float up) {
    if (a.activation == kSilu) return gate / (1.0f + expf(-gate)) * up;
    gate = gate > a.limit ? a.limit : gate;
    up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
    return gate / (1.0f + expf(-a.alpha * gate)) * (up + 1.0f);
}

// Some places of one expert.
struct Tile {
    uint32_t expert;
    uint32_t first;  // place
    uint32_t count;  // 0: no tile
};

// A tile of the tile map, whose tiles have up to `tile_rows` places.
__device__ __forceinline__ Tile tile_of(const ProjectionArguments& a, uint32_t tile, uint32_t tile_rows) {
    const uint32_t expert = a.tile_experts[tile], first = a.tile_starts[tile];
    if (expert == kNothing) return {0, 0, 0};
    return {expert, first, min(tile_rows, a.expert_offsets[expert + 1] - first)};
}

// The number of tiles; all threads of the block call it, and meet at a barrier if max_tiles is not 0.
__device__ __forceinline__ uint32_t count_tiles(const ProjectionArguments& a) {
    uint32_t count = 0;
    for (uint32_t first = 0; first < a.max_tiles; first += blockDim.x) {
        const uint32_t tile = first + threadIdx.x;
        count += __syncthreads_count(tile < a.max_tiles && a.tile_experts[tile] != kNothing);
    }
    return count;
}

}  // namespace moe
