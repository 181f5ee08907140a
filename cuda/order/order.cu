// Expert order of ids that are given, and its second launch; order/order.cuh says how.
//
//     order   one launch (o.whole), or the first of two
//     place   the second of two: this, and what follows order/routed.cu
//     tiles   the tile map of offsets that are given

#include "order/order.cuh"

extern "C" __global__ void __launch_bounds__(512) order(const __grid_constant__ moe::OrderArguments o) {
    moe::allow_next_kernel();
    moe::order_chunk(o, [&](const moe::Counters& c) {
        const moe::Span span = moe::chunk_span(o, blockIdx.x);
        for (uint32_t i = threadIdx.x; i < span.end - span.first; i += blockDim.x) {
            const uint32_t slot = span.first + i;
            c.mark(i, i, moe::local_expert(o, slot, o.topk_ids[slot]));
        }
    });
}

extern "C" __global__ void __launch_bounds__(moe::kPlaceThreads) place(const __grid_constant__ moe::OrderArguments o) {
    MOE_DYNAMIC_SHARED(uint32_t, memory);
    if (o.packed) {
        moe::place_chunks<true>(o, memory);
    } else {
        moe::place_chunks<false>(o, memory);
    }
}

namespace moe {

struct TileArguments {
    const uint32_t* expert_offsets;  // [num_local + 1]
    uint32_t* tile_experts;          // [max_tiles]
    uint32_t* tile_starts;           // [max_tiles]
    uint32_t num_local;
    uint32_t tile_rows;
    uint32_t max_tiles;
};

}  // namespace moe

// Every block sums up the tiles for itself.
extern "C" __global__ void __launch_bounds__(512) tiles(const moe::TileArguments a) {
    MOE_DYNAMIC_SHARED(uint32_t, memory);
    uint32_t* const scratch = memory;            // [32]
    uint32_t* const tile_offsets = memory + 32;  // [num_local + 1]
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t per_thread = (a.num_local + blockDim.x - 1) / blockDim.x;
    const uint32_t first = min(threadIdx.x * per_thread, a.num_local), end = min(first + per_thread, a.num_local);
    const auto tiles_of = [&](uint32_t e) {
        return moe::tiles_of(a.expert_offsets[e + 1] - a.expert_offsets[e], a.tile_rows, 32);
    };
    uint32_t sum = 0;
    for (uint32_t e = first; e < end; ++e) sum += tiles_of(e);
    const uint32_t up_to = moe::warp_inclusive_sum(sum, lane);
    if (lane == 31) scratch[warp] = up_to;
    __syncthreads();
    sum = up_to - sum + __reduce_add_sync(moe::kAllLanes, lane < warp ? scratch[lane] : 0);
    for (uint32_t e = first; e < end; ++e) {
        tile_offsets[e] = sum;
        sum += tiles_of(e);
    }
    if (end == a.num_local && (first < end || threadIdx.x == 0)) tile_offsets[end] = sum;
    __syncthreads();
    moe::write_tiles(a, a.expert_offsets, tile_offsets, 0);
    moe::clear_tiles(a, tile_offsets[a.num_local]);
}
