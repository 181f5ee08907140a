// Brings hidden states into the order in which experts/tiled.cuh takes them: those of a tile's places together, chunk by chunk
// of 64 features, in rows of 128 bytes whose pieces of 16 bytes are swizzled. A warp has a place.

#include "experts/tiled.cuh"

namespace moe {

constexpr uint32_t kGatherThreads = 256;

template <uint32_t kPlaces>
__device__ __forceinline__ void gather(const ProjectionArguments& a) {
    allow_next_kernel();
    wait_for_previous_kernel();
    constexpr uint32_t kAtOnce = kGatherThreads / 32, kBlocks = kPlaces / kAtOnce;
    const Tile tile = tile_of(a, blockIdx.x / kBlocks, kPlaces);
    const uint32_t place = blockIdx.x % kBlocks * kAtOnce + threadIdx.x / 32;
    if (place >= tile.count) return;
    const uint32_t token = a.sorted_slots[tile.first + place] / a.top_k, pieces = a.in_features / 8;
    const uint4* const from = static_cast<const uint4*>(a.input) + uint64_t(token) * pieces;
    unsigned char* const to = static_cast<unsigned char*>(a.output) + tile_offset(tile.first, a.in_features);
#pragma unroll 4
    for (uint32_t i = threadIdx.x % 32; i < pieces; i += 32) {
        const uint64_t chunk = uint64_t(i / 8) * (tile.count * kSwizzledRowBytes);
        *reinterpret_cast<uint4*>(to + chunk + swizzled(place, i % 8)) = from[i];
    }
}

}  // namespace moe

#define GATHER(PLACES)                                                                                     \
    extern "C" __global__ void __launch_bounds__(moe::kGatherThreads)                                      \
        gather_##PLACES(const __grid_constant__ moe::ProjectionArguments a) {                              \
        moe::gather<PLACES>(a);                                                                            \
    }
GATHER(96)
GATHER(160)
