// Expert order of ids that are given, and its second launch; order/order.cuh says how.
//
//     order   one launch (o.whole), or the first of two
//     place   the second of two: this, and what follows order/routed.cu
//     tiles   the tile map of offsets that are given

#include "order/order.cuh"

extern "C" __global__ void __launch_bounds__(512) order(const __grid_constant__ moe::OrderArguments o) {
    moe::allow_next_kernel();
    moe::order_chunk(o, [&](uint16_t* counts) {
        const moe::Span span = moe::warp_span(o);
        const uint32_t lane = threadIdx.x % 32;
        for (uint64_t i = span.first; i < span.end; i += 32) {
            const bool in = i + lane < span.end;
            const uint32_t slot = static_cast<uint32_t>(i + lane);
            const uint32_t expert = in ? moe::local_expert(o, slot, o.topk_ids[slot]) : moe::kNobody;
            const uint32_t before = moe::count_any(counts, expert, lane);
            if (in) o.slot_rank[slot] = before;
        }
    });
}

extern "C" __global__ void __launch_bounds__(512) place(const __grid_constant__ moe::OrderArguments o) {
    moe::wait_for_previous_kernel();
    // The threads of a chunk's block are those of this one.
    const uint32_t chunk_slots = o.warp_slots * (blockDim.x / 32);
    if (moe::pitch_of(o) >= 128) {
        moe::place_chunks<8>(o, chunk_slots);
    } else {
        moe::place_chunks<2>(o, chunk_slots);
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
    const uint32_t per_thread = (a.num_local + blockDim.x - 1) / blockDim.x;
    const uint32_t first = min(threadIdx.x * per_thread, a.num_local), end = min(first + per_thread, a.num_local);
    const auto tiles_of = [&](uint32_t e) {
        const uint32_t count = a.expert_offsets[e + 1] - a.expert_offsets[e];
        return count / a.tile_rows + (count % a.tile_rows != 0);
    };
    uint32_t sum = 0;
    for (uint32_t e = first; e < end; ++e) sum += tiles_of(e);
    sum = moe::block_exclusive_sum(sum, scratch);
    for (uint32_t e = first; e < end; ++e) {
        tile_offsets[e] = sum;
        sum += tiles_of(e);
    }
    if (end == a.num_local && (first < end || threadIdx.x == 0)) tile_offsets[end] = sum;
    __syncthreads();
    const uint32_t num_tiles = tile_offsets[a.num_local];
    for (uint32_t t = blockIdx.x * blockDim.x + threadIdx.x; t < a.max_tiles; t += gridDim.x * blockDim.x) {
        uint32_t expert = moe::kNobody, start = moe::kNoSlot;
        if (t < num_tiles) {
            expert = moe::tile_expert(tile_offsets, a.num_local, t);
            start = a.expert_offsets[expert] + (t - tile_offsets[expert]) * a.tile_rows;
        }
        a.tile_experts[t] = expert;
        a.tile_starts[t] = start;
    }
}
