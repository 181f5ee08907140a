// The experts' projections for few tokens of an expert: they stay in shared memory while the weights go past them once, both
// projections in one launch.
//
//     band     16 rows of a tile's expert; a block has neighbouring bands, first of gate_up, then of down
//     part     kMaxParts of a band at most, some units each; warps take the parts of a block's bands in turn
//     visit    a tile of which the block has bands; the loader, one warp, brings its tokens into a room, visit after visit
//
// Made for m16n8k16 with the weights as its rows, so that 8 tokens fill it. Why it is fast: what limits is how fast weights
// come from memory, and every byte of them is read once, side by side and in fragment order (experts/fragments.cuh).
//
// 1. A warp goes its own way from part to part: it has kSlots pieces of weights under way, of the coming part too, and meets
//    nobody. Whoever is the last to have a part of a band adds up all of them, in their order.
// 2. Nothing that a warp needs is looked up in memory while weights are under way, where an answer takes as long as all of them:
//    tiles are in registers, tokens come by the loader, a bias is asked for before the part that it is added to.
// 3. No more is under way than memory needs to be busy, so that tokens, which are asked for at the same time, do not queue
//    behind it; at the start not even that.
// 4. No block waits for all others: a tile's h is there when its bands are, each of which is told apart from the others'.
// 5. Few instructions for each weight, since at full speed a multiprocessor has 40 cycles for a unit and four schedulers:
//    a scale is multiplied in together with the 2^126 that raw operands lack.
//
// Wide scales (and half) instead scale the sums of 32 columns in float32, which any power of two allows.
#pragma once

#include <type_traits>

#include "common/hopper.cuh"
#include "common/signals.cuh"
#include "experts/fragments.cuh"

namespace moe {

// Warps of a block that multiply, at most; src/experts/cuda/path.rs knows these numbers.
constexpr uint32_t kMaxWarps = 18;
// Parts of a band, at most, and bands whose parts have room until they are added up.
constexpr uint32_t kMaxParts = 4, kSumRooms = 10;
// Rooms for the tokens of a tile, at most.
constexpr uint32_t kMaxRooms = 2;
// Parts that a warp has taken and is not done with, at most: pieces of as many are under way.
constexpr uint32_t kPartsAhead = 4;
// Units of a piece, what a warp asks for at once, and pieces that it has room for.
template <typename Format> constexpr uint32_t kPieceUnits = Format::kWords == 1 ? 5 : 1;
template <typename Format> constexpr uint32_t kSlots = Format::kWords == 1 ? 2 : 3;
template <typename Format> constexpr uint32_t kUnitBytes = Format::kWords * 512;
constexpr uint32_t kScaleBytes = 32;  // of a unit
// Bytes of a piece: values, then scales.
template <typename Format>
constexpr uint32_t kPieceBytes = kPieceUnits<Format> * (kUnitBytes<Format> + (Format::kHasScales ? kScaleBytes : 0));

// How MXFP4 is scaled: the weights, or the sums of 32 columns.
template <bool kWide> struct Scaled : MxFp4 {
    static constexpr bool kScalesSums = kWide;
};
using Narrow4 = Scaled<false>;
using Wide4 = Scaled<true>;

// The A operands of a step of MXFP4, without scales: 2^-126 of the value in bfloat16, 2^-14 in half.
template <typename T> __device__ __forceinline__ void raw_operands(uint32_t word, uint32_t (&a)[4]);
template <> __device__ __forceinline__ void raw_operands<__nv_bfloat16>(uint32_t word, uint32_t (&a)[4]) {
    MxFp4::raw_operands(word, a);
}
template <> __device__ __forceinline__ void raw_operands<__half>(uint32_t word, uint32_t (&a)[4]) {
    MxFp4::raw_operands(word, a);
    // A half has its exponent three bits further up.
#pragma unroll
    for (int p = 0; p < 4; ++p) a[p] = (a[p] & 0x80008000u) | (a[p] & 0x01c001c0u) << 3;
}

// What a kernel is made for: tiles of 8 kBlocks places.
template <typename Format_, typename T_, int kBlocks_>
struct Made {
    using Format = Format_;
    using T = T_;
    static constexpr int kBlocks = kBlocks_;
    static constexpr uint32_t kPlaces = 8 * kBlocks;
    static constexpr uint32_t kUnits = kPieceUnits<Format>;
    static constexpr uint32_t kPiece = kPieceBytes<Format>;
    static constexpr uint32_t kRing = kSlots<Format>;
    static constexpr uint32_t kColumnBytes = kUnitColumns * sizeof(T);
};

// The tiles of the order, the first of them in registers: tile 32 i + lane in register i of a lane, and the slot of place `lane`.
struct Tiles {
    static constexpr uint32_t kRegisters = 4, kHeld = 32 * kRegisters;
    uint32_t experts[kRegisters], starts[kRegisters];
    uint32_t first_slots;
    uint32_t count;

    __device__ __forceinline__ explicit Tiles(const ProjectionArguments& a) : count(0) {
        const uint32_t lane = threadIdx.x % 32;
        first_slots = lane < a.num_rows ? a.sorted_slots[lane] : 0;
#pragma unroll
        for (uint32_t i = 0; i < kRegisters; ++i) {
            const uint32_t tile = 32 * i + lane;
            const bool is_in = tile < a.max_tiles;
            experts[i] = is_in ? a.tile_experts[tile] : kNothing, starts[i] = is_in ? a.tile_starts[tile] : 0;
        }
#pragma unroll
        for (uint32_t i = 0; i < kRegisters; ++i) count += __popc(__ballot_sync(kAllLanes, experts[i] != kNothing));
        for (uint32_t first = kHeld; first == count && first < a.max_tiles; first += 32) {
            const uint32_t tile = first + lane;
            count += __popc(__ballot_sync(kAllLanes, tile < a.max_tiles && a.tile_experts[tile] != kNothing));
        }
    }
    // These by all lanes of a warp; each may ask for another place.
    __device__ __forceinline__ uint32_t slot(const ProjectionArguments& a, uint32_t place) const {
        const uint32_t held = __shfl_sync(kAllLanes, first_slots, place % 32);
        return place < 32 ? held : a.sorted_slots[place];
    }
    __device__ __forceinline__ uint32_t expert(const ProjectionArguments& a, uint32_t tile) const {
        return tile < kHeld ? held(experts, tile) : a.tile_experts[tile];
    }
    __device__ __forceinline__ uint32_t start(const ProjectionArguments& a, uint32_t tile) const {
        return tile < kHeld ? held(starts, tile) : a.tile_starts[tile];
    }
    // The tile, with all of its places.
    __device__ __forceinline__ Tile whole(const ProjectionArguments& a, uint32_t tile, uint32_t places) const {
        const uint32_t of = expert(a, tile), first = start(a, tile);
        // Places stand side by side, so that a tile ends where the next begins; the last one is looked up.
        const uint32_t end = tile + 1 < count ? start(a, tile + 1) : a.expert_offsets[of + 1];
        return {of, first, min(places, end - first)};
    }

  private:
    static constexpr uint32_t kAllLanes = 0xffffffffu;

    static __device__ __forceinline__ uint32_t held(const uint32_t (&of)[kRegisters], uint32_t tile) {
        const uint32_t mine = tile < 64 ? tile < 32 ? of[0] : of[1] : tile < 96 ? of[2] : of[3];
        return __shfl_sync(kAllLanes, mine, tile % 32);
    }
};

// Divides by the same number again and again, which the device does in twenty instructions otherwise.
struct Divisor {
    uint32_t by, inverse;

    __device__ __forceinline__ explicit Divisor(uint32_t by) : by(by), inverse(0xffffffffu / by) {}
    __device__ __forceinline__ uint32_t divide(uint32_t number, uint32_t& rest) const {
        uint32_t quotient = __umulhi(number, inverse);  // or one less than it should be
        rest = number - quotient * by;
        if (rest >= by) rest -= by, ++quotient;
        return quotient;
    }
    __device__ __forceinline__ uint32_t divide(uint32_t number) const {
        uint32_t rest;
        return divide(number, rest);
    }
};

// How a projection is cut up, whatever the order is.
struct Cut {
    Divisor bands;   // of a tile
    Divisor parts;   // of a band
    uint32_t units;  // of a band
};

// Neighbouring bands of a projection.
struct Bands {
    uint32_t tile, band;  // the first
    uint32_t count;
    uint32_t visits;      // tiles that they are of

    // Those of this block, of those of all tiles, which are fewer than 2^32.
    static __device__ __forceinline__ Bands of_block(uint32_t num_tiles, const Divisor& of_tile) {
        const uint32_t all = num_tiles * of_tile.by, each = all / gridDim.x, longer = all - each * gridDim.x;
        const uint32_t first = blockIdx.x * each + min(blockIdx.x, longer), count = each + (blockIdx.x < longer);
        uint32_t band;
        const uint32_t tile = of_tile.divide(first, band);
        return {tile, band, count, count == 0 ? 0 : of_tile.divide(band + count - 1) + 1};
    }
};

// Some units of a band.
struct alignas(16) Part {
    uint32_t is_down;
    uint32_t tile, band, visit;
    uint32_t number, parts;       // which of the band's
    uint32_t first_unit, units;
    uint32_t row_of_sums;         // which of the block's bands of several parts
};

// What a block has to do, in its order.
struct Work {
    const LayerArguments& a;
    Cut gate_up_cut, down_cut;
    Bands gate_up, down;

    // Before the order is there.
    __device__ __forceinline__ explicit Work(const LayerArguments& a)
        : a(a), gate_up_cut(cut(a.gate_up, kBandRows / 2)), down_cut(cut(a.down, kBandRows)), gate_up{}, down{} {}
    static __device__ __forceinline__ Cut cut(const ProjectionArguments& a, uint32_t features_of_band) {
        return {Divisor(a.out_features / features_of_band), Divisor(a.parts), a.in_features / kUnitColumns};
    }

    __device__ __forceinline__ void share(uint32_t num_tiles) {
        gate_up = Bands::of_block(num_tiles, gate_up_cut.bands);
        down = Bands::of_block(num_tiles, down_cut.bands);
    }

    __device__ __forceinline__ const ProjectionArguments& of(uint32_t is_down) const { return is_down ? a.down : a.gate_up; }
    __device__ __forceinline__ uint32_t parts() const { return gate_up.count * a.gate_up.parts + down.count * a.down.parts; }
    __device__ __forceinline__ uint32_t visits() const { return gate_up.visits + down.visits; }
    __device__ __forceinline__ uint32_t is_down(uint32_t visit) const { return visit >= gate_up.visits; }
    __device__ __forceinline__ uint32_t tile(uint32_t visit) const {
        return is_down(visit) ? down.tile + (visit - gate_up.visits) : gate_up.tile + visit;
    }

    __device__ __forceinline__ Part part(uint32_t number) const {
        const uint32_t before = gate_up.count * a.gate_up.parts;
        if (number < before) return part_of(number, 0, gate_up_cut, gate_up, 0, 0);
        return part_of(number - before, 1, down_cut, down, gate_up.visits, a.gate_up.parts > 1 ? gate_up.count : 0);
    }

  private:
    static __device__ __forceinline__ Part part_of(
        uint32_t number, uint32_t is_down, const Cut& cut, const Bands& bands, uint32_t visits_before, uint32_t rows_before) {
        Part part;
        const uint32_t nth = cut.parts.divide(number, part.number), tiles = cut.bands.divide(bands.band + nth, part.band);
        part.is_down = is_down;
        part.tile = bands.tile + tiles;
        part.visit = visits_before + tiles;
        part.parts = cut.parts.by;
        part.first_unit = cut.parts.divide(cut.units * part.number);
        part.units = cut.parts.divide(cut.units * (part.number + 1)) - part.first_unit;
        part.row_of_sums = rows_before + nth;
        return part;
    }
};

// What the warps of a block share.
template <typename M>
struct Shared {
    uint32_t warps, lane, warp;  // warps that multiply; `warp` is `warps` for the loader
    uint32_t rooms, row_bytes;   // 1 or 2; a row is 16 bytes longer than it must be, so that the 8 rows of a matrix lie in different banks
    SharedAddress tokens;        // [rooms, kPlaces, row_bytes]
    float4* sums;                // of this lane, [kSumRooms, kMaxParts, kBlocks, 32 lanes]
    SharedAddress pieces;        // of this warp, [kRing, kPiece]
    SharedAddress full, empty;   // [rooms] barriers: a visit's tokens are there, or no longer needed
    SharedAddress arrived;       // of this warp, [kRing] barriers: a piece is there
    Tile* tiles;                 // [rooms]
    Part* parts;                 // of this warp, [kPartsAhead]: those that it has taken last
    uint32_t* next_part;         // that nobody has taken
    uint32_t* added;             // [kSumRooms]: parts that are there
    uint32_t* rounds;            // [kSumRooms]: bands that were added up

    __device__ __forceinline__ Shared(const ProjectionArguments& a)
        : warps(blockDim.x / 32 - 1), lane(threadIdx.x % 32), warp(threadIdx.x / 32), rooms(a.rooms),
          row_bytes((a.token_features + 8) * sizeof(typename M::T)) {
        MOE_DYNAMIC_SHARED(unsigned char, memory);
        __shared__ uint64_t of_pieces[kMaxWarps][M::kRing], of_rooms[2][kMaxRooms];
        __shared__ Tile in_rooms[kMaxRooms];
        __shared__ Part of_warps[kMaxWarps][kPartsAhead];
        __shared__ uint32_t counters[1 + 2 * kSumRooms];
        const uint32_t bytes_of_tokens = rooms * M::kPlaces * row_bytes;
        tokens = shared_address(memory);
        sums = reinterpret_cast<float4*>(memory + bytes_of_tokens) + lane;
        pieces = tokens + bytes_of_tokens + kSumRooms * kMaxParts * M::kBlocks * 512 + warp * (M::kRing * M::kPiece);
        full = shared_address(of_rooms[0]), empty = shared_address(of_rooms[1]);
        arrived = shared_address(of_pieces[warp < warps ? warp : 0]);
        parts = of_warps[warp < warps ? warp : 0];
        tiles = in_rooms, next_part = counters, added = counters + 1, rounds = added + kSumRooms;
        if (threadIdx.x == 0) {
            // Each lane of the loader when its copies are there, and one when it knows the tile; a lane of those that multiply.
            for (uint32_t i = 0; i < rooms; ++i) start_barrier(full_of(i), 33), start_barrier(empty_of(i), warps);
            *next_part = warps;
        }
        if (threadIdx.x < 2 * kSumRooms) added[threadIdx.x] = 0;
        if (warp < warps && lane < M::kRing) start_barrier(arrived + lane * kBarrierBytes, 1);
#ifdef MOE_HOPPER
        show_barriers();
#endif
        __syncthreads();
    }
    // Where the tokens of a visit are, and which of those there it is.
    __device__ __forceinline__ uint32_t room(uint32_t visit) const { return visit & (rooms - 1); }
    __device__ __forceinline__ uint32_t turn(uint32_t visit) const { return visit >> (rooms - 1); }
    __device__ __forceinline__ SharedAddress full_of(uint32_t room) const { return full + room * kBarrierBytes; }
    __device__ __forceinline__ SharedAddress empty_of(uint32_t room) const { return empty + room * kBarrierBytes; }
    __device__ __forceinline__ SharedAddress tokens_of(uint32_t room, uint32_t place) const {
        return tokens + (room * M::kPlaces + place) * row_bytes;
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The loader

// Brings the tokens of visit after visit.
template <typename M>
__device__ __forceinline__ void load_tokens(const Work& work, const Tiles& tiles, const Shared<M>& shared) {
    const LayerArguments& a = work.a;
    const uint32_t visits = work.visits(), lane = shared.lane;
    for (uint32_t visit = 0; visit < visits; ++visit) {
        const uint32_t room = shared.room(visit), turn = shared.turn(visit), is_down = work.is_down(visit);
        const ProjectionArguments& projection = work.of(is_down);
        const Tile tile = tiles.whole(a.gate_up, work.tile(visit), M::kPlaces);
        uint32_t row = tile.first + lane;  // of the input, for the place of this lane
        if (!is_down) row = tiles.slot(a.gate_up, lane < tile.count ? row : tile.first) / a.gate_up.top_k;
        if (turn > 0) wait_for_phase(shared.empty_of(room), (turn - 1) % 2);
        if (is_down) {
            while (load_relaxed(done_of(a, work.tile(visit))) < work.gate_up_cut.bands.by) pause();
            see_what_was_released();
        }
        const uint32_t words = projection.in_features / 8;  // of 16 bytes
        for (uint32_t place = 0; place < tile.count; ++place) {
            const uint64_t from = __shfl_sync(0xffffffffu, row, place);
            const uint4* const source = static_cast<const uint4*>(projection.input) + from * words;
            const SharedAddress to = shared.tokens_of(room, place);
#pragma unroll 4
            for (uint32_t word = lane; word < words; word += 32) copy_16(to + word * 16, source + word);
        }
        if (lane == 0) {
            shared.tiles[room] = tile;
            arrive(shared.full_of(room));
        }
        arrive_behind_copies(shared.full_of(room));
    }
    commit_copies();
    wait_for_copies<0>();
}

// ------------------------------------------------------------------------------------------------------------------
// Those that multiply

// The pieces of weights of a warp, part after part.
template <typename M>
struct Stream {
    using Format = typename M::Format;

    const Work& work;
    const Tiles& tiles;
    const Shared<M>& shared;
    const uint32_t all;      // parts of the block
    uint32_t taken = 0;      // parts that this warp has taken
    uint32_t left = 0;       // units of the last one that are still to be fetched
    bool is_dry = false;     // nothing is left to take
    const unsigned char *values, *scales;  // of the next piece
    uint32_t filled = 0, emptied = 0, parity = 0;  // slots; parity of the pieces that are emptied

    __device__ __forceinline__ Stream(const Work& work, const Tiles& tiles, const Shared<M>& shared)
        : work(work), tiles(tiles), shared(shared), all(work.parts()) {}

    // Whether the warp has an nth part; it has taken the next one before it is done with one.
    __device__ __forceinline__ bool has(uint32_t n) const { return n < taken; }

    // Puts the next piece under way, if there is one.
    __device__ __forceinline__ void fetch() {
        if (left == 0 && !is_dry) take_part();
        if (left > 0) {
            const uint32_t count = min(M::kUnits, left);
            bring_units(count);
            values += count * kUnitBytes<Format>;
            if (Format::kHasScales) scales += count * kScaleBytes;
            left -= count;
            filled = filled + 1 == M::kRing ? 0 : filled + 1;
        }
#ifndef MOE_HOPPER
        commit_copies();  // an empty group too, so that groups can be counted
#endif
    }

    // Waits for the oldest piece, and says where it is.
    __device__ __forceinline__ SharedAddress wait() const {
#ifdef MOE_HOPPER
        wait_for_phase(shared.arrived + emptied * kBarrierBytes, parity);
#else
        wait_for_copies<M::kRing - 1>();
        __syncwarp();  // scales were copied by other lanes
#endif
        return shared.pieces + emptied * M::kPiece;
    }
    // No lane needs the oldest piece any more.
    __device__ __forceinline__ void pass() {
        __syncwarp();
        emptied = emptied + 1 == M::kRing ? 0 : emptied + 1;
        parity ^= emptied == 0;
        fetch();
    }

  private:
    // The first part of a warp is the one of its number, the others are whichever comes next.
    __device__ __forceinline__ void take_part() {
        uint32_t number = shared.warp;
        if (taken > 0) {
            if (shared.lane == 0) number = atomicAdd(shared.next_part, 1u);
            number = __shfl_sync(0xffffffffu, number, 0);
        }
        is_dry = number >= all;
        if (is_dry) return;
        const Part part = work.part(number);
        if (shared.lane == 0) shared.parts[taken % kPartsAhead] = part;
        ++taken;
        const ProjectionArguments& a = work.of(part.is_down);
        const uint32_t bands = part.is_down ? work.down_cut.bands.by : work.gate_up_cut.bands.by;
        const uint32_t units = part.is_down ? work.down_cut.units : work.gate_up_cut.units;
        const uint64_t band = uint64_t(tiles.expert(work.a.gate_up, part.tile)) * bands + part.band;
        const uint64_t unit = band * units + part.first_unit;
        values = static_cast<const unsigned char*>(a.weights) + unit * kUnitBytes<Format>;
        scales = static_cast<const unsigned char*>(a.scales) + unit * kScaleBytes;
        left = part.units;
    }

    __device__ __forceinline__ void bring_units(uint32_t count) const {
        const SharedAddress to = shared.pieces + filled * M::kPiece, to_scales = to + M::kUnits * kUnitBytes<Format>;
#ifdef MOE_HOPPER
        if (shared.lane == 0) {
            const uint32_t scale_bytes = Format::kHasScales ? count * kScaleBytes : 0;
            const SharedAddress barrier = shared.arrived + filled * kBarrierBytes;
            bring(to, values, count * kUnitBytes<Format>, to_scales, scales, scale_bytes, barrier);
        }
#else
        const uint32_t part = shared.lane * 16;
#pragma unroll
        for (uint32_t i = 0; i < M::kUnits * Format::kWords; ++i) {
            if (i < count * Format::kWords) copy_16(to + i * 512 + part, values + i * 512 + part);
        }
        if (Format::kHasScales && part < count * kScaleBytes) copy_16(to_scales + part, scales + part);
#endif
    }
};

// A lane's part of a unit, as it was copied.
template <typename Format>
struct Unit {
    uint4 words[Format::kWords];
    uint32_t scale;

    __device__ __forceinline__ void load(SharedAddress values, SharedAddress scales) {
#pragma unroll
        for (int i = 0; i < Format::kWords; ++i) words[i] = load_shared_16(values + i * 512);
        if (Format::kHasScales) scale = load_shared_4(scales);
    }
};

template <typename Format, typename T>
__device__ __forceinline__ void decode_unit(const Unit<Format>& unit, uint32_t (&a)[kSteps][4]) {
    if constexpr (Format::kHasScales) {
        raw_operands<T>(unit.words[0].x, a[0]);
        raw_operands<T>(unit.words[0].y, a[1]);
        raw_operands<T>(unit.words[0].z, a[2]);
        raw_operands<T>(unit.words[0].w, a[3]);
        if constexpr (std::is_same_v<T, __half>) return;
        uint32_t factors[2] = {kPairOf126, kPairOf126};
        if constexpr (!Format::kScalesSums) factors_of_scales(unit.scale, factors);
        scale_operands<0>(a[0], factors);
        scale_operands<1>(a[1], factors);
        scale_operands<2>(a[2], factors);
        scale_operands<3>(a[3], factors);
    } else {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            a[s][0] = unit.words[s].x, a[s][1] = unit.words[s].y, a[s][2] = unit.words[s].z, a[s][3] = unit.words[s].w;
        }
    }
}

// B operands of a unit's steps, two steps to four registers.
template <int kBlocks>
struct Columns {
    uint32_t b[kBlocks][2][4];

    // `tokens` is this lane's row of the matrices.
    __device__ __forceinline__ Columns(SharedAddress tokens, uint32_t block_bytes) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            load_matrices(b[block][0], tokens + block * block_bytes);
            load_matrices(b[block][1], tokens + block * block_bytes + 64);
        }
    }
};

// Sums of a band: for one block of tokens two of them, so that not every product waits for the one before it.
template <int kBlocks>
struct Accumulators {
    static constexpr int kChains = kBlocks == 1 ? 2 : 1;
    float sums[kBlocks][kChains][4] = {};

    __device__ __forceinline__ float4 of(int block) const {
        const float(&a)[4] = sums[block][0], (&b)[4] = sums[block][kChains - 1];
        if (kChains == 1) return make_float4(a[0], a[1], a[2], a[3]);
        return make_float4(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]);
    }
};

// Adds the products of a unit.
template <typename Format, typename T, int kBlocks>
__device__ __forceinline__ void add_unit(
    const Unit<Format>& unit, const Columns<kBlocks>& columns, Accumulators<kBlocks>& c) {
    uint32_t a[kSteps][4];
    decode_unit<Format, T>(unit, a);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        const auto multiply = [&](int s, float(&sums)[4]) {
            const uint32_t(&b)[4] = columns.b[block][s / 2];
            mma_16x8x16<T>(sums, a[s], {b[s % 2 * 2], b[s % 2 * 2 + 1]});
        };
        if constexpr (Format::kScalesSums) {
            float parts[2][4] = {};
#pragma unroll
            for (int s = 0; s < kSteps; ++s) multiply(s, parts[s / 2]);
            constexpr float kLacking = std::is_same_v<T, __half> ? 16384.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float power = power_of_scale(unit.scale >> (i / 4 * 16 + i % 4 / 2 * 8) & 0xffu);
                float& sum = c.sums[block][0][i % 4];
                sum = fmaf(power, parts[i / 4][i % 4] * kLacking, sum);
            }
        } else {
#pragma unroll
            for (int s = 0; s < kSteps; ++s) multiply(s, c.sums[block][s % Accumulators<kBlocks>::kChains]);
        }
    }
}

// The bias of rows g and g + 8 of a band, which counts with the first of its parts.
struct Bias {
    float of[2] = {};

    __device__ __forceinline__ Bias(const ProjectionArguments& a, const Part& part, uint32_t expert) {
        if (a.bias == nullptr || part.number > 0) return;
        const Kind kind = part.is_down ? kDown : kGateUp;
        const uint32_t rows = part.is_down ? a.out_features : 2 * a.out_features;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t row = published_row(kind, a.gate_up_rows, rows, part.band, threadIdx.x % 32 / 4 + 8 * i);
            of[i] = a.bias[uint64_t(expert) * rows + row];
        }
    }
};

// Writes the results of rows g and g + 8 of a band for tokens 2t and 2t + 1 of a block of 8.
template <typename T>
__device__ __forceinline__ void write_results(
    const ProjectionArguments& a, const Tile& tile, uint32_t is_down, uint32_t band, uint32_t block, const float4& sums) {
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const float first[2] = {sums.x, sums.y}, second[2] = {sums.z, sums.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t token = block * 8 + 2 * t + i;
        if (token >= tile.count) break;
        const uint64_t to = uint64_t(tile.first + token) * a.out_features;
        if (is_down) {
            keep_both(static_cast<float*>(a.output) + to + band * kBandRows + 2 * g, first[i], second[i]);
        } else {
            keep(static_cast<T*>(a.output) + to + band * 8 + g, activate(a, first[i], second[i]));
        }
    }
}

// A warp that multiplies.
template <typename M>
struct Worker {
    using T = typename M::T;
    using Format = typename M::Format;
    static constexpr int kBlocks = M::kBlocks;

    const Work& work;
    const Tiles& tiles;
    const Shared<M>& shared;
    uint32_t visit = 0;
    uint32_t kept_tile = kNothing;                   // of the last band of gate_up that this warp has finished, until it tells
    uint32_t seen_tile = kNothing, seen_before = 0;  // of the last band of down that it has finished

    __device__ __forceinline__ void run() {
        Stream<M> stream(work, tiles, shared);
        stream.fetch();
        bool is_first = true;
        for (uint32_t n = 0; stream.has(n); ++n) {
            __syncwarp();
            const Part part = shared.parts[n % kPartsAhead];
            if (part.is_down) tell();
            go_to(part.visit);
            // Asked for before the part, since an answer takes as long as the weights that are under way.
            const Bias bias(work.of(part.is_down), part, tiles.expert(work.a.gate_up, part.tile));
            wait_for_tokens();
            const uint32_t room = shared.room(visit);
            if (is_first) {
                // Only now, so that the first tokens did not have to queue behind.
#pragma unroll 1
                for (uint32_t i = 1; i < M::kRing; ++i) stream.fetch();
                is_first = false;
            }
            Accumulators<kBlocks> c;
            multiply_part(stream, part, room, c);
            float4 sums[kBlocks];
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) {
                const float4 sum = c.of(i);
                sums[i] = {sum.x + bias.of[0], sum.y + bias.of[0], sum.z + bias.of[1], sum.w + bias.of[1]};
            }
            if (part.parts == 1 || add_up(part, sums)) finish(part, shared.tiles[room], sums);
        }
        tell();
        go_to(work.visits());
        if (shared.lane == 0) settle();
    }

  private:
    // Tells the loader of the visits that this warp is done with. Those that it has nothing of are waited for too: a phase can
    // only be told from the next one.
    __device__ __forceinline__ void go_to(uint32_t next) {
        for (; visit < next; ++visit) {
            wait_for_tokens();
            if (shared.lane == 0) arrive(shared.empty_of(shared.room(visit)));
        }
    }
    __device__ __forceinline__ void wait_for_tokens() const {
        wait_for_phase(shared.full_of(shared.room(visit)), shared.turn(visit) % 2);
    }

    __device__ __forceinline__ void multiply_part(
        Stream<M>& stream, const Part& part, uint32_t room, Accumulators<kBlocks>& c) const {
        SharedAddress tokens = shared.tokens_of(room, shared.lane % 8) + shared.lane / 8 * 16 + part.first_unit * M::kColumnBytes;
        for (uint32_t left = part.units; left > 0; left -= min(left, M::kUnits), tokens += M::kUnits * M::kColumnBytes) {
            const SharedAddress values = stream.wait() + shared.lane * 16;
            const SharedAddress scales = values - shared.lane * 16 + M::kUnits * kUnitBytes<Format> + shared.lane / 4 * 4;
            const auto add = [&](uint32_t i) {
                Unit<Format> unit;
                unit.load(values + i * kUnitBytes<Format>, scales + i * kScaleBytes);
                add_unit<Format, T>(unit, Columns<kBlocks>(tokens + i * M::kColumnBytes, 8 * shared.row_bytes), c);
            };
            if (left >= M::kUnits) {
#pragma unroll
                for (uint32_t i = 0; i < M::kUnits; ++i) add(i);
            } else {
#pragma unroll 1
                for (uint32_t i = 0; i < left; ++i) add(i);
            }
            stream.pass();
        }
    }

    // Leaves the sums of a part; whoever is the last of its band has those of all of them then.
    __device__ __forceinline__ bool add_up(const Part& part, float4 (&sums)[kBlocks]) const {
        const uint32_t room = part.row_of_sums % kSumRooms, round = part.row_of_sums / kSumRooms, lane = shared.lane;
        while (see_shared(shared.rounds + room) != round) pause();
        float4* const parts = shared.sums + room * (kMaxParts * kBlocks * 32);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) parts[(part.number * kBlocks + i) * 32] = sums[i];
        __threadfence_block();
        __syncwarp();
        uint32_t before = 0;
        if (lane == 0) before = atomicAdd(shared.added + room, 1u);
        if (__shfl_sync(0xffffffffu, before, 0) + 1 < part.parts) return false;
        __threadfence_block();
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            sums[i] = parts[i * 32];
            for (uint32_t p = 1; p < part.parts; ++p) {
                const float4 more = parts[(p * kBlocks + i) * 32];
                sums[i].x += more.x, sums[i].y += more.y, sums[i].z += more.z, sums[i].w += more.w;
            }
        }
        __syncwarp();
        if (lane == 0) {
            shared.added[room] = 0;
            __threadfence_block();
            show_shared(shared.rounds + room, round + 1);
        }
        return true;
    }

    __device__ __forceinline__ void finish(const Part& part, const Tile& tile, const float4 (&sums)[kBlocks]) {
        const ProjectionArguments& a = work.of(part.is_down);
        tell();
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) write_results<T>(a, tile, part.is_down, part.band, i, sums[i]);
        if (!part.is_down) {
            kept_tile = part.tile;
        } else if (shared.lane == 0) {
            settle();
            seen_tile = part.tile;
            seen_before = atomicAdd(seen_of(work.a, part.tile), 1u);
        }
    }

    // Tells the other blocks of a finished band of gate_up: one such band later, when what was written of it has long arrived and
    // is not waited for, or when nothing but down is left.
    __device__ __forceinline__ void tell() {
        __syncwarp();
        if (kept_tile != kNothing && shared.lane == 0) add_release(done_of(work.a, kept_tile));
        kept_tile = kNothing;
    }

    // Whoever finished a tile's last band of down leaves the tile's numbers as they were: nobody looks at them any more. What
    // came before is looked at one band later, when the answer is there.
    __device__ __forceinline__ void settle() {
        if (seen_tile == kNothing || seen_before + 1 < work.down_cut.bands.by) return;
        *done_of(work.a, seen_tile) = *seen_of(work.a, seen_tile) = 0;
    }
};

template <typename M>
__device__ __forceinline__ void run_layer(const LayerArguments& a) {
    const Shared<M> shared(a.gate_up);
    Work work(a);
    wait_for_previous_kernel();
    // Not before: experts/home.cu finds what has been written until here.
    allow_next_kernel();
    const Tiles tiles(a.gate_up);
    work.share(tiles.count);
    if (shared.warp == shared.warps) {
        load_tokens(work, tiles, shared);
    } else {
        Worker<M>{work, tiles, shared}.run();
    }
}

}  // namespace moe
