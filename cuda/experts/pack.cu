// Brings published weights into fragment order (experts/fragments.cuh), once, when they come to the device: a thread writes
// one word of 32 bits, neighbours side by side.
//
//     pack_mxfp4          blocks u8 [num_local, rows, columns / 32, 16] to values
//     pack_mxfp4_scales   scales u8 [num_local, rows, columns / 32] to scale words
//     pack_16             16-bit floats [num_local, rows, columns] to values

#include "common/launch.cuh"
#include "experts/fragments.cuh"

namespace moe {

struct PackArguments {
    const void* published;
    uint32_t* packed;
    uint64_t num_words;     // of packed
    uint32_t kind;
    uint32_t gate_up_rows;
    uint32_t rows;          // of a matrix
    uint32_t columns;
};

// The row of all experts' published matrices that is row `r` of band `band` of all bands.
__device__ __forceinline__ uint64_t source_row(const PackArguments& a, uint64_t band, uint32_t r) {
    const uint32_t bands = a.rows / kBandRows;
    const Kind kind = static_cast<Kind>(a.kind);
    return band / bands * a.rows + published_row(kind, a.gate_up_rows, a.rows, static_cast<uint32_t>(band % bands), r);
}

// The row and the first column of register p of lane `lane`, in a step.
__device__ __forceinline__ uint32_t row_of_register(uint32_t lane, uint32_t p) { return lane / 4 + p % 2 * 8; }
__device__ __forceinline__ uint32_t column_of_register(uint32_t lane, uint32_t p) { return lane % 4 * 2 + p / 2 * 8; }

__device__ __forceinline__ void pack_mxfp4_word(const PackArguments& a, uint64_t i) {
    const uint32_t step = i % kSteps, lane = i / kSteps % 32, units = a.columns / kUnitColumns;
    const uint64_t unit = i / (kSteps * 32), band = unit / units;
    const uint32_t first = static_cast<uint32_t>(unit % units) * kUnitColumns + step * 16;
    uint32_t word = 0;
    for (uint32_t p = 0; p < 4; ++p) {
        const uint64_t row = source_row(a, band, row_of_register(lane, p));
        const uint32_t column = first + column_of_register(lane, p);
        const uint8_t both = static_cast<const uint8_t*>(a.published)[(row * a.columns + column) / 2];
        word |= MxFp4::placed(p, both & 15u, both >> 4);
    }
    a.packed[i] = word;
}

__device__ __forceinline__ void pack_scale_word(const PackArguments& a, uint64_t i) {
    const uint32_t g = i % 8, units = a.columns / kUnitColumns;
    const uint64_t unit = i / 8, band = unit / units;
    uint32_t word = 0;
    for (uint32_t j = 0; j < 4; ++j) {
        const uint64_t row = source_row(a, band, g + j % 2 * 8);
        const uint64_t block = unit % units * 2 + j / 2;
        word |= uint32_t(static_cast<const uint8_t*>(a.published)[row * (a.columns / 32) + block]) << (8 * j);
    }
    a.packed[i] = word;
}

__device__ __forceinline__ void pack_16_word(const PackArguments& a, uint64_t i) {
    const uint32_t p = i % 4, lane = i / 4 % 32, steps = a.columns / 16;
    const uint64_t step = i / 128, band = step / steps;
    const uint64_t row = source_row(a, band, row_of_register(lane, p));
    const uint64_t column = step % steps * 16 + column_of_register(lane, p);
    a.packed[i] = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(a.published) + row * a.columns + column);
}

// Threads walk over all words.
template <typename Pack>
__device__ __forceinline__ void pack_all(const PackArguments& a, Pack pack) {
    const uint64_t threads = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.num_words; i += threads) pack(a, i);
}

}  // namespace moe

#define PACK(NAME, WORD)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ moe::PackArguments a) {   \
        moe::pack_all(a, [](const moe::PackArguments& a, uint64_t i) { moe::WORD(a, i); });                  \
    }
PACK(pack_mxfp4, pack_mxfp4_word)
PACK(pack_mxfp4_scales, pack_scale_word)
PACK(pack_16, pack_16_word)
