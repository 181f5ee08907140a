// MXFP4 experts for a single token, or a few slots: no block waits for another.
//
//     single        the features of a chunk through both projections, a block for each chunk of a place's expert:
//                       h[f] = round(activation(W1 x + b1))
//                       parts[place, chunk] = the columns of W2 that belong to these features, times h; + b2 in chunk 0
//     single_rows   row of a place = its parts, added up
//     single_sums   sums[token] = round(sum over k of topk_weights[slot] * row of slot_rank[slot])
//
// A block is kTeams teams of kTeamWarps warps. A team has 32 features: 4 bands of gate_up, then the half of a column of units of
// down that they are multiplied with (experts/fragments.cuh). A warp takes units of 4 neighbouring bands at a time, a quad, in
// gate_up along the columns, in down along the rows.
//
// Why it is fast: a weight is used once, so only the memory counts, and memory rests wherever one product waits for another.
//
// 1. Of down only what a block's own h meets is the block's work. So blocks never meet, and while a team has its h together the
//    weights of down that come next are under way.
// 2. Products of m16n8k16 have eight columns, of which one token needs one. The others make scaling cheap: each column has one
//    band and one scale block of 32 columns, the rest of it is zero, so that what a scale multiplies is a sum of a lane's own,
//    and weights are multiplied raw. What these lack, 2^126, the token has, as far as it fits, which is exact.
// 3. Weights come 16 bytes a lane to shared memory, where the lane that asked for them is the one that reads them: no barrier.
//    Two quads of a warp under way keep memory busy; with three a token comes later and blocks end less together.
// 4. Two teams share a column of units of down, and each copies whole units though it needs half: memory brings them once, and what
//    comes out of the L2 cache a second time costs less than teams that wait for each other would.
// 5. All blocks have the same work, and there are as many as multiprocessors, or a few less.
//
// Limits: both sizes are multiples of 64; num_slots and the tiles are up to 32. Any scale but 255 will do. Where a feature of a
// token is beyond 2^100 times others, products of these that are below 2^-20 lose bits.

#include "common/barriers.cuh"
#include "experts/fragments.cuh"

namespace moe {

// src/experts/cuda/single.rs knows these.
constexpr uint32_t kTeams = 3, kTeamWarps = 5, kSingleWarps = kTeams * kTeamWarps, kSingleThreads = 32 * kSingleWarps;
constexpr uint32_t kTeamFeatures = 32, kTeamBands = kTeamFeatures / 8;
constexpr uint32_t kQuadsAhead = 2;
constexpr uint32_t kUnitBytes = 512, kScaleBytes = 32, kColumnBytes = 2 * kUnitColumns;
// A quad: of each band the unit, then of band t for lane 4g + t the scales of rows g and g + 8.
constexpr uint32_t kQuadBands = 4, kQuadBytes = kQuadBands * kUnitBytes + 32 * 4;

// ------------------------------------------------------------------------------------------------------------------
// Powers of two that wait in the token for the weights

// The larger magnitude of two bfloat16, as bits.
__device__ __forceinline__ uint32_t magnitude(uint32_t pair) { return max(pair & 0x7fffu, pair >> 16 & 0x7fffu); }

// The largest exponent, up to 126, such that 2^exponent times a bfloat16 of this magnitude is finite if that is.
__device__ __forceinline__ uint32_t headroom(uint32_t magnitude) { return min(126u, 254u - min(254u, magnitude >> 7)); }

__device__ __forceinline__ float power(uint32_t exponent) { return __uint_as_float((127 + exponent) << 23); }

__device__ __forceinline__ uint32_t raise(uint32_t pair, float by) {
    return pair_of(low_of<__nv_bfloat16>(pair) * by, low_of<__nv_bfloat16>(pair >> 16) * by, static_cast<__nv_bfloat16*>(nullptr));
}

// ------------------------------------------------------------------------------------------------------------------
// Weights on their way

// The quads of a warp in one of the matrices.
struct Course {
    const unsigned char *values, *scales;  // of this lane, of the next quad
    uint32_t unit_step;                    // units from one quad to the next
    uint32_t band_units;                   // units from one band to the next
    uint32_t left;

    // From `unit` of all units on.
    __device__ __forceinline__ Course(
        const ProjectionArguments& a, uint64_t unit, uint32_t unit_step, uint32_t band_units, uint32_t count)
        : unit_step(unit_step), band_units(band_units), left(count) {
        const uint32_t lane = threadIdx.x % 32;
        values = static_cast<const unsigned char*>(a.weights) + unit * kUnitBytes + lane * 16;
        scales = static_cast<const unsigned char*>(a.scales) + (unit + lane % 4 * band_units) * kScaleBytes + lane / 4 * 4;
    }
    __device__ __forceinline__ void fetch(SharedAddress to) {
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t i = 0; i < kQuadBands; ++i) copy_16(to + i * kUnitBytes + lane * 16, values + i * band_units * kUnitBytes);
        copy_4(to + kQuadBands * kUnitBytes + lane * 4, scales);
        values += unit_step * kUnitBytes, scales += unit_step * kScaleBytes;
        --left;
    }
};

// Those of gate_up, then those of down, through a ring of the warp.
struct Quads {
    Course gate_up, down;
    SharedAddress ring;
    uint32_t filled = 0, emptied = 0;

    __device__ __forceinline__ void fetch() {
        const SharedAddress to = ring + filled * kQuadBytes;
        if (gate_up.left > 0) {
            gate_up.fetch(to);
        } else if (down.left > 0) {
            down.fetch(to);
        }
        commit_copies();  // an empty group too, so that groups can be counted
        filled = filled + 1 == kQuadsAhead ? 0 : filled + 1;
    }
    // The oldest quad.
    __device__ __forceinline__ void take(uint4 (&words)[kQuadBands], uint32_t& scales) {
        wait_for_copies<kQuadsAhead - 1>();
        const SharedAddress from = ring + emptied * kQuadBytes;
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t i = 0; i < kQuadBands; ++i) words[i] = load_shared_16(from + i * kUnitBytes + lane * 16);
        scales = load_shared_4(from + kQuadBands * kUnitBytes + lane * 4);
        emptied = emptied + 1 == kQuadsAhead ? 0 : emptied + 1;
    }
};

// The part of `count` things that one of kTeamWarps warps has.
struct Share {
    uint32_t first, count;

    __device__ __forceinline__ Share(uint32_t all, uint32_t member)
        : first(all * member / kTeamWarps), count(all * (member + 1) / kTeamWarps - first) {}
};

// ------------------------------------------------------------------------------------------------------------------
// A block

// What is at a place: a slot's token and its expert.
struct Place {
    uint32_t slot, expert;

    // kNothing: nobody is there. By whole warps.
    static __device__ __forceinline__ Place at(const ProjectionArguments& a, const uint32_t* slot_rank, uint32_t place) {
        const uint32_t lane = threadIdx.x % 32;
        const uint32_t rank = lane < a.num_rows ? slot_rank[lane] : kNothing;
        const uint32_t tile_expert = lane < a.max_tiles ? a.tile_experts[lane] : kNothing;
        const uint32_t tile_start = lane < a.max_tiles ? a.tile_starts[lane] : 0;
        const uint32_t slots = __ballot_sync(kAllLanes, rank == place);
        // Tiles are in the order of their places.
        const uint32_t tiles = __ballot_sync(kAllLanes, tile_expert != kNothing && tile_start <= place);
        const uint32_t expert = __shfl_sync(kAllLanes, tile_expert, tiles == 0 ? 0 : __popc(tiles) - 1);
        return {slots == 0 ? kNothing : __ffs(slots) - 1, expert};
    }
};

struct SingleArguments {
    ProjectionArguments gate_up, down;  // output of down: parts, float32 [num_slots, chunks, hidden_size]
    const uint32_t* slot_rank;          // [num_slots]
    uint32_t chunks;
};

// The token in shared memory, times 2^raised.
struct Token {
    SharedAddress columns;
    SharedAddress zeros;  // 16 bytes

    // The B operands of a unit's steps: column 2 `band` is the token's first 32 columns of it, the next one the others.
    __device__ __forceinline__ void operands(uint32_t (&b)[2][4], uint32_t unit, uint32_t band) const {
        const uint32_t lane = threadIdx.x % 32, column = lane % 8;
        const SharedAddress from = columns + unit * kColumnBytes + lane / 8 * 16;
        load_matrices(b[0], column == 2 * band ? from : zeros);
        load_matrices(b[1], column == 2 * band + 1 ? from + kColumnBytes / 2 : zeros);
    }
};

// Adds the products of a quad of gate_up to the sums of rows g and g + 8 of band t.
__device__ __forceinline__ void add_quad(
    float (&sums)[2], const uint4 (&words)[kQuadBands], uint32_t scales, const Token& token, uint32_t unit) {
    float c[2][4] = {};  // of the first 32 columns, of the others
#pragma unroll
    for (uint32_t band = 0; band < kQuadBands; ++band) {
        uint32_t a[kSteps][4], b[2][4];
        token.operands(b, unit, band);
        MxFp4::raw_operands(words[band].x, a[0]);
        MxFp4::raw_operands(words[band].y, a[1]);
        MxFp4::raw_operands(words[band].z, a[2]);
        MxFp4::raw_operands(words[band].w, a[3]);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            mma_16x8x16<__nv_bfloat16>(c[s / 2], a[s], {b[s / 2][s % 2 * 2], b[s / 2][s % 2 * 2 + 1]});
        }
    }
    // Column 2t has nothing of the other columns of the units, and column 2t + 1 nothing of the first.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sums[i] = fmaf(power_of_scale(scales >> (8 * i) & 0xffu), c[0][2 * i], sums[i]);
        sums[i] = fmaf(power_of_scale(scales >> (8 * i + 16) & 0xffu), c[1][2 * i + 1], sums[i]);
    }
}

// The products of half a quad of down with h: rows g and g + 8 of band t.
__device__ __forceinline__ float2 multiply_half(
    const uint4 (&words)[kQuadBands], uint32_t scales, bool is_upper, const uint32_t (&h)[2][2]) {
    float c[4] = {};
#pragma unroll
    for (uint32_t band = 0; band < kQuadBands; ++band) {
        const bool is_its = threadIdx.x % 32 / 4 == 2 * band;
        uint32_t a[2][4];
        MxFp4::raw_operands(is_upper ? words[band].z : words[band].x, a[0]);
        MxFp4::raw_operands(is_upper ? words[band].w : words[band].y, a[1]);
#pragma unroll
        for (int s = 0; s < 2; ++s) mma_16x8x16<__nv_bfloat16>(c, a[s], {is_its ? h[s][0] : 0, is_its ? h[s][1] : 0});
    }
    scales >>= is_upper ? 16 : 0;
    return {c[0] * power_of_scale(scales & 0xffu), c[2] * power_of_scale(scales >> 8 & 0xffu)};
}

// The features of a lane as B operands of two steps, the same in every column, and what they lack.
__device__ __forceinline__ float spread(uint32_t (&h)[2][2], float value) {
    // Rounded here, so that it is exact there.
    value = __bfloat162float(__float2bfloat16_rn(value));
    const uint32_t raised = headroom(__reduce_max_sync(kAllLanes, magnitude(__float_as_uint(value) >> 16)));
    const float high = value * power(raised);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t feature = 8 * i + 2 * (threadIdx.x % 4);
        const float first = __shfl_sync(kAllLanes, high, feature), second = __shfl_sync(kAllLanes, high, feature + 1);
        h[i / 2][i % 2] = pair_of(first, second, static_cast<__nv_bfloat16*>(nullptr));
    }
    return power(126 - raised);
}

__device__ __forceinline__ void run_chunk(const SingleArguments& a) {
    MOE_DYNAMIC_SHARED(unsigned char, memory);  // the token; b2 and the sums of each team, float32; rings
    __shared__ float of_warps[kTeams][kTeamWarps][kTeamBands * kBandRows];
    __shared__ __align__(16) uint32_t zeros[4];
    __shared__ uint64_t meetings[kTeams];
    __shared__ uint32_t largest;
    static_assert(sizeof(of_warps) + sizeof(zeros) + sizeof(meetings) + sizeof(largest) <= 4096 - 128, "as single.rs counts it");
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp / kTeamWarps, member = warp % kTeamWarps;
    if (threadIdx.x < 4) zeros[threadIdx.x] = 0;
    if (threadIdx.x == 0) largest = 0;
    if (threadIdx.x < kTeams) start_barrier(shared_address(meetings + threadIdx.x), 32 * kTeamWarps);
    __syncthreads();

    const ProjectionArguments &up = a.gate_up, &down = a.down;
    const uint32_t number = blockIdx.x / a.chunks, chunk = blockIdx.x - number * a.chunks;
    const uint32_t half = chunk * kTeams + team, halves = up.out_features / kTeamFeatures;
    const uint32_t token_words = up.in_features / 8, columns = down.out_features;
    const Token token = {shared_address(memory), shared_address(zeros)};
    float* const bias = reinterpret_cast<float*>(memory + token_words * 16);
    float* const sums = bias + (1 + team) * columns;
    uint4* const words_of_token = reinterpret_cast<uint4*>(memory);

    wait_for_previous_kernel();
    // Not before: what comes next finds what was written until here.
    allow_next_kernel();
    const Place place = Place::at(up, a.slot_rank, number);
    if (place.slot == kNothing) return;
    const uint4* const from = static_cast<const uint4*>(up.input) + uint64_t(place.slot / up.top_k) * token_words;
    for (uint32_t i = threadIdx.x; i < token_words; i += kSingleThreads) copy_16(token.columns + i * 16, from + i);
    commit_copies();

    const uint32_t up_units = up.in_features / kUnitColumns, down_units = down.in_features / kUnitColumns;
    const uint32_t up_bands = up.out_features / 8, down_bands = columns / kBandRows;
    const bool is_in = half < halves;
    const Share units(is_in ? up_units : 0, member), quads(is_in ? down_bands / kQuadBands : 0, member);
    const uint64_t first_up = (uint64_t(place.expert) * up_bands + half * kTeamBands) * up_units + units.first;
    const uint64_t first_down = (uint64_t(place.expert) * down_bands + quads.first * kQuadBands) * down_units + half / 2;
    Quads stream = {Course(up, first_up, 1, up_units, units.count),
                    Course(down, first_down, kQuadBands * down_units, down_units, quads.count),
                    shared_address(bias + (1 + kTeams) * columns) + warp * (kQuadsAhead * kQuadBytes)};
    if (chunk == 0 && down.bias != nullptr) {
        const uint4* const b2 = reinterpret_cast<const uint4*>(down.bias + uint64_t(place.expert) * columns);
        for (uint32_t i = threadIdx.x; i < columns / 4; i += kSingleThreads) copy_16(shared_address(bias + 4 * i), b2 + i);
    }
#pragma unroll 1
    for (uint32_t i = 0; i < kQuadsAhead; ++i) stream.fetch();
    float b1[2] = {};
    if (is_in && up.bias != nullptr) {
        const uint32_t rows = 2 * up.out_features, band = half * kTeamBands + lane / 8;
        const float* const of_expert = up.bias + uint64_t(place.expert) * rows;
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) b1[i] = of_expert[published_row(kGateUp, up.gate_up_rows, rows, band, lane % 8 + 8 * i)];
    }

    wait_for_copies<kQuadsAhead>();
    uint32_t mine = 0;
    for (uint32_t i = threadIdx.x; i < token_words; i += kSingleThreads) {
        const uint4 words = words_of_token[i];
        mine = max(mine, max(max(magnitude(words.x), magnitude(words.y)), max(magnitude(words.z), magnitude(words.w))));
    }
    mine = __reduce_max_sync(kAllLanes, mine);
    if (lane == 0) atomicMax(&largest, mine);
    __syncthreads();
    const uint32_t raised = headroom(largest);
    for (uint32_t i = threadIdx.x; i < token_words; i += kSingleThreads) {
        const float by = power(raised);
        const uint4 words = words_of_token[i];
        words_of_token[i] = {raise(words.x, by), raise(words.y, by), raise(words.z, by), raise(words.w, by)};
    }
    __syncthreads();

    uint4 words[kQuadBands];
    uint32_t scales;
    float parts[2] = {};
#pragma unroll 1
    for (uint32_t i = 0; i < units.count; ++i) {
        stream.take(words, scales);
        add_quad(parts, words, scales, token, units.first + i);
        stream.fetch();
    }
    of_warps[team][member][lane % 4 * kBandRows + lane / 4] = parts[0];
    of_warps[team][member][lane % 4 * kBandRows + lane / 4 + 8] = parts[1];
    arrive(shared_address(meetings + team));
    wait_for_phase(shared_address(meetings + team), 0);

    // A lane has a feature, in every warp of the team.
    float gate_and_up[2] = {};
#pragma unroll
    for (uint32_t i = 0; i < kTeamWarps; ++i) {
        gate_and_up[0] += of_warps[team][i][lane / 8 * kBandRows + lane % 8];
        gate_and_up[1] += of_warps[team][i][lane / 8 * kBandRows + lane % 8 + 8];
    }
    const float back = power(126 - raised);
    uint32_t h[2][2];
    const float lacking = spread(h, activate(up, gate_and_up[0] * back + b1[0], gate_and_up[1] * back + b1[1]));
#pragma unroll 1
    for (uint32_t i = 0; i < quads.count; ++i) {
        stream.take(words, scales);
        const float2 pair = multiply_half(words, scales, half % 2, h);
        stream.fetch();
        float2* const to = reinterpret_cast<float2*>(sums + ((quads.first + i) * kQuadBands + lane % 4) * kBandRows + lane / 4 * 2);
        *to = make_float2(pair.x * lacking, pair.y * lacking);
    }
    wait_for_copies<0>();
    __syncthreads();

    const float4* const rows = reinterpret_cast<const float4*>(bias);
    float4* const to = static_cast<float4*>(down.output) + uint64_t(blockIdx.x) * (columns / 4);
    const uint32_t first = chunk == 0 && down.bias != nullptr ? 0 : 1, last = min(kTeams, halves - chunk * kTeams);
    for (uint32_t i = threadIdx.x; i < columns / 4; i += kSingleThreads) {
        float4 sum = rows[first * (columns / 4) + i];
        for (uint32_t row = first + 1; row <= last; ++row) {
            const float4 more = rows[row * (columns / 4) + i];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        to[i] = sum;
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Parts to rows and sums

struct PartsArguments {
    const float* parts;         // [num_slots, chunks, hidden_size]
    const float* topk_weights;  // [num_tokens, top_k]
    const uint32_t* slot_rank;  // [num_slots]
    void* output;               // rows: float32 [num_slots, hidden_size]; sums: [num_tokens, hidden_size]
    uint32_t chunks;
    uint32_t top_k;             // rows: 1
    uint32_t hidden_size;
};

// A block has kPartColumns times 4 columns of a token, kPartSlots of its slots at once, with kPartGroups threads for each, of
// which a warp has some.
constexpr uint32_t kPartColumns = 8, kPartGroups = 16, kPartSlots = 4, kGroupWarps = kPartGroups * kPartColumns / 32;
constexpr uint32_t kPartThreads = kPartColumns * kPartGroups * kPartSlots;

__device__ __forceinline__ float4 added(const float4& a, const float4& b) {
    return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w)};
}
// That of the lane whose number differs in this bit.
__device__ __forceinline__ float4 across(const float4& a, uint32_t bit) {
    return {__shfl_xor_sync(kAllLanes, a.x, bit), __shfl_xor_sync(kAllLanes, a.y, bit), __shfl_xor_sync(kAllLanes, a.z, bit),
            __shfl_xor_sync(kAllLanes, a.w, bit)};
}
__device__ __forceinline__ float4 times(float weight, const float4& a) {
    return {__fmul_rn(weight, a.x), __fmul_rn(weight, a.y), __fmul_rn(weight, a.z), __fmul_rn(weight, a.w)};
}

// The slots of a token, a few at once: rows are their parts, added up always in the same order. Calls `take(token, column, row)`
// with each slot's, in the order of slots, times the slot's weight if kWeighted; 0 for slots that are nowhere.
template <bool kWeighted, typename Take>
__device__ __forceinline__ void add_parts(const PartsArguments& a, Take take) {
    __shared__ float4 of_warps[kPartSlots][kGroupWarps][kPartColumns];
    allow_next_kernel();
    const uint32_t columns = a.hidden_size / 4, blocks = (columns + kPartColumns - 1) / kPartColumns;
    const uint32_t token = blockIdx.x / blocks, own = threadIdx.x % kPartColumns;
    const uint32_t column = (blockIdx.x - token * blocks) * kPartColumns + own;
    const uint32_t group = threadIdx.x / kPartColumns % kPartGroups, nth = threadIdx.x / (kPartColumns * kPartGroups);
    uint32_t rank;
    float weight;
    const auto look_up = [&](uint32_t k) {
        const uint32_t slot = token * a.top_k + k;
        rank = k < a.top_k ? a.slot_rank[slot] : kNothing;
        weight = kWeighted && k < a.top_k ? a.topk_weights[slot] : 1.0f;
    };
    // Those that come first while the kernel before this one works: it lets no other begin before the order is written.
    look_up(nth);
    wait_for_previous_kernel();
    for (uint32_t first = 0; first < a.top_k; first += kPartSlots) {
        if (first > 0) look_up(first + nth);
        float4 row = {};
        if (rank != kNothing && column < columns) {
            const float4* const parts = reinterpret_cast<const float4*>(a.parts) + uint64_t(rank) * a.chunks * columns + column;
#pragma unroll 2
            for (uint32_t chunk = group; chunk < a.chunks; chunk += kPartGroups) row = added(row, __ldcg(parts + chunk * columns));
        }
#pragma unroll
        for (uint32_t bit = kPartColumns; bit < 32; bit *= 2) row = added(row, across(row, bit));
        if (threadIdx.x % 32 < kPartColumns) of_warps[nth][threadIdx.x / 32 % kGroupWarps][own] = row;
        __syncthreads();
        if (group == 0 && rank != kNothing) {
#pragma unroll
            for (uint32_t i = 1; i < kGroupWarps; ++i) row = added(row, of_warps[nth][i][own]);
            of_warps[nth][0][own] = kWeighted ? times(weight, row) : row;
        }
        __syncthreads();
        if (threadIdx.x < kPartColumns && column < columns) {
            for (uint32_t i = 0; i < min(kPartSlots, a.top_k - first); ++i) take(token, column, of_warps[i][0][own]);
        }
        __syncthreads();
    }
}

template <typename T>
__device__ __forceinline__ void bring_parts_home(const PartsArguments& a) {
    float4 sums = {};
    uint32_t taken = 0;
    add_parts<true>(a, [&](uint32_t token, uint32_t column, const float4& row) {
        sums = added(sums, row);
        if (++taken < a.top_k) return;
        T* const to = static_cast<T*>(a.output) + uint64_t(token) * a.hidden_size + 4 * column;
        keep_both(to, sums.x, sums.y);
        keep_both(to + 2, sums.z, sums.w);
    });
}

}  // namespace moe

extern "C" __global__ void __launch_bounds__(moe::kSingleThreads, 1) single(const __grid_constant__ moe::SingleArguments a) {
    moe::run_chunk(a);
}
extern "C" __global__ void __launch_bounds__(moe::kPartThreads) single_rows(const __grid_constant__ moe::PartsArguments a) {
    moe::add_parts<false>(a, [&](uint32_t slot, uint32_t column, const float4& row) {
        const uint32_t rank = a.slot_rank[slot];
        if (rank != moe::kNothing) static_cast<float4*>(a.output)[uint64_t(rank) * (a.hidden_size / 4) + column] = row;
    });
}
#define SINGLE_SUMS(T, NAME)                                                                                      \
    extern "C" __global__ void __launch_bounds__(moe::kPartThreads) single_sums_##NAME(                           \
        const __grid_constant__ moe::PartsArguments a) {                                                          \
        moe::bring_parts_home<T>(a);                                                                              \
    }
SINGLE_SUMS(float, f32)
SINGLE_SUMS(__half, f16)
SINGLE_SUMS(__nv_bfloat16, bf16)
