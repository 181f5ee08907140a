// Expert weights as the tensor cores take them, re-arranged once when they come to the device (experts/pack.cu).
//
// A matrix [rows, columns] of an expert is cut into bands of 16 rows and these into units of 64 columns: the A operands of
// m16n8k16 (common/matrix.cuh), register by register.
//
//     values  uint4 [num_local, bands, units, kWords, 32 lanes], or [.., units, 32 lanes] where kWords is 1
//     scales  uint32 [num_local, bands, units, 8], MXFP4 only
//
// A unit is 64 columns, four steps of 16:
//
//     format   bytes   of lane 4g + t
//     16 bits  2048    for each step, 16 bytes: a[0..4]
//     MXFP4    512     16 bytes: word s has the 8 nibbles of step s (MxFp4::placed), a[0..4];
//                      scale word g: rows g and g + 8 of columns 0..32, then of columns 32..64
//
// Rows of a band: of a plain matrix 16 i .. 16 i + 16; of gate and up 8 gate rows, then the 8 up rows that belong to them,
// so that both stand in the same thread's sums. One copy of the weights serves mma.sync and wgmma, whose A fragments are the
// same, and is read in order, 16 bytes a lane.
#pragma once

#include "common/matrix.cuh"
#include "experts/projection.cuh"

namespace moe {

constexpr uint32_t kBandRows = 16;
constexpr uint32_t kUnitColumns = 64;
constexpr int kSteps = 4;  // of a unit, 16 columns each

// The row of the published matrix of `rows` rows that is row `r` of band `band`.
__device__ __forceinline__ uint32_t published_row(Kind kind, uint32_t gate_up_rows, uint32_t rows, uint32_t band, uint32_t r) {
    if (kind == kDown) return band * kBandRows + r;
    const uint32_t feature = band * 8 + r % 8;
    return gate_up_rows == kInterleaved ? 2 * feature + r / 8 : feature + r / 8 * (rows / 2);
}

// ------------------------------------------------------------------------------------------------------------------
// MXFP4

// Each pair of nibbles stands in a word so that a shift and a mask make two 16-bit floats of it: sign to bit 15, exponent and
// mantissa to bits 8, 7, 6. Bits of a half word, from bit 15 down, by the A register that they belong to:
//
//     0  3  3  1  3  3  2  0  0  0  1  1  1  2  2  2
//     s  s  e  s  e  m  s  e  e  m  e  e  m  e  e  m
struct MxFp4 {
    static constexpr int kWords = 1;  // of 16 bytes, that a lane has of a unit
    static constexpr bool kHasScales = true;

    // The place in a half word of bit b (3: sign, 2 and 1: exponent, 0: mantissa) of the nibble for register p.
    static __device__ __forceinline__ uint32_t place_of(uint32_t p, uint32_t b) {
        if (p == 3) return b == 3 ? 14 : b == 2 ? 13 : b == 1 ? 11 : 10;
        return (b == 3 ? 15 : 6 + b) - 3 * p;
    }

    // The pair of nibbles for register p, in its places.
    static __device__ __forceinline__ uint32_t placed(uint32_t p, uint32_t low, uint32_t high) {
        uint32_t word = 0;
        for (uint32_t b = 0; b < 4; ++b) {
            word |= (low >> b & 1) << place_of(p, b) | (high >> b & 1) << (place_of(p, b) + 16);
        }
        return word;
    }

    // The nibble for register p, the low or the high one.
    static __device__ __forceinline__ uint32_t nibble(uint32_t word, uint32_t p, uint32_t high) {
        uint32_t bits = 0;
        for (uint32_t b = 0; b < 4; ++b) bits |= (word >> (place_of(p, b) + 16 * high) & 1) << b;
        return bits;
    }

    // The bits of four pairs of bfloat16, each 2^-126 of its value.
    static __device__ __forceinline__ void raw_operands(uint32_t word, uint32_t (&a)[4]) {
        constexpr uint32_t kBits = 0x81c081c0u;
        a[0] = word & kBits;
        a[1] = word << 3 & kBits;
        a[2] = word << 6 & kBits;
        a[3] = (word << 1 & 0x80008000u) | (word >> 5 & 0x01000100u) | (word >> 4 & 0x00c000c0u);
    }
};

// 16-bit floats, as they are.
struct Plain {
    static constexpr int kWords = kSteps;
    static constexpr bool kHasScales = false;
    static constexpr bool kScalesSums = false;
};

// Two bfloat16 by two others, each rounded.
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#ifdef CANDLE_MOE_EMULATOR
    const auto rounded = [](float v) { return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(v))); };
    return rounded(low_of<__nv_bfloat16>(a) * low_of<__nv_bfloat16>(b)) |
           rounded(low_of<__nv_bfloat16>(a >> 16) * low_of<__nv_bfloat16>(b >> 16)) << 16;
#else
    uint32_t product;  // fma, since mul needs compute capability 9.0; -0 keeps the sign of zero
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
#endif
}

// 2^126 twice, as bfloat16: what raw operands lack.
constexpr uint32_t kPairOf126 = 0x7e807e80u;

// 2^126 * 2^(scale - 127) twice, as bfloat16, of each byte of a scale word; for scales up to 128.
__device__ __forceinline__ void pairs_of_scales(uint32_t word, uint32_t (&pairs)[4]) {
    constexpr uint32_t kLacking = 126u * 0x00800080u;
    const uint32_t even = (word & 0x00ff00ffu) * 128u + kLacking, odd = (word >> 8 & 0x00ff00ffu) * 128u + kLacking;
    pairs[0] = __byte_perm(even, 0, 0x1010);
    pairs[1] = __byte_perm(odd, 0, 0x1010);
    pairs[2] = __byte_perm(even, 0, 0x3232);
    pairs[3] = __byte_perm(odd, 0, 0x3232);
}

// 2^(scale - 127).
__device__ __forceinline__ float power_of_scale(uint32_t scale) {
    return __uint_as_float(scale == 0 ? 0x00400000u : scale << 23);
}

}  // namespace moe
