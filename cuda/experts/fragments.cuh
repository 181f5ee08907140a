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
// Rows of a band: of a plain matrix the even ones of 16 i .. 16 i + 16, then the odd ones, so that neighbours stand in the same
// thread's sums; of gate and up 8 gate rows, then the 8 up rows that belong to them, for the same reason. One copy of the
// weights serves mma.sync and wgmma, whose A fragments are the same, and is read in order, 16 bytes a lane.
#pragma once

#include "common/matrix.cuh"
#include "experts/projection.cuh"

namespace moe {

constexpr uint32_t kBandRows = 16;
constexpr uint32_t kUnitColumns = 64;
constexpr int kSteps = 4;  // of a unit, 16 columns each

// The row of the published matrix of `rows` rows that is row `r` of band `band`.
__device__ __forceinline__ uint32_t published_row(Kind kind, uint32_t gate_up_rows, uint32_t rows, uint32_t band, uint32_t r) {
    if (kind == kDown) return band * kBandRows + r % 8 * 2 + r / 8;
    const uint32_t feature = band * 8 + r % 8;
    return gate_up_rows == kInterleaved ? 2 * feature + r / 8 : feature + r / 8 * (rows / 2);
}

// ------------------------------------------------------------------------------------------------------------------
// MXFP4

// Four pairs of nibbles fill a word, such that masks make 16-bit floats of each pair once it is turned: sign to bit 15, exponent
// and mantissa to bits 8, 7, 6. Three pairs need one turn at most and the last one needs two, which is as few as there can be;
// most turns may be plain shifts. Bits of a half word, from bit 15 down, by the A register that they belong to; those of
// register 2 stand in the half word of the other nibble of the pair, but for the sign:
//
//     0  2  2  2  1  3  3  0  0  0  2  1  1  1  3  3
//     s  e  e  m  s  e  s  e  e  m  s  e  e  m  e  m
struct MxFp4 {
    static constexpr int kWords = 1;  // of 16 bytes, that a lane has of a unit
    static constexpr bool kHasScales = true;

    // The place in a word of bit b (3: sign, 2 and 1: exponent, 0: mantissa) of the low nibble for register p; that of the high
    // one is 16 further.
    static __device__ __forceinline__ uint32_t place_of(uint32_t p, uint32_t b) {
        const uint32_t place = b == 3 ? 15 : 6 + b;
        const uint32_t turned = p == 0 ? 0 : p == 1 ? 4 : p == 2 ? 10 : b == 2 ? 30 : 6;
        return (place - turned) % 32;
    }

    // The pair of nibbles for register p, in its places.
    static __device__ __forceinline__ uint32_t placed(uint32_t p, uint32_t low, uint32_t high) {
        uint32_t word = 0;
        for (uint32_t b = 0; b < 4; ++b) {
            word |= (low >> b & 1) << place_of(p, b) | (high >> b & 1) << (place_of(p, b) + 16) % 32;
        }
        return word;
    }

    // The nibble for register p, the low or the high one.
    static __device__ __forceinline__ uint32_t nibble(uint32_t word, uint32_t p, uint32_t high) {
        uint32_t bits = 0;
        for (uint32_t b = 0; b < 4; ++b) bits |= (word >> (place_of(p, b) + 16 * high) % 32 & 1) << b;
        return bits;
    }

    // The bits of four pairs of bfloat16, each 2^-126 of its value.
    static __device__ __forceinline__ void raw_operands(uint32_t word, uint32_t (&a)[4]) {
        constexpr uint32_t kBits = 0x81c081c0u;
        a[0] = word & kBits;
        a[1] = word << 4 & kBits;
        a[2] = __funnelshift_l(word, word, 10) & kBits;
        a[3] = (word << 6 & 0x80c080c0u) | (word >> 2 & 0x01000100u);
    }
};

// 16-bit floats, as they are.
struct Plain {
    static constexpr int kWords = kSteps;
    static constexpr bool kHasScales = false;
    static constexpr bool kScalesSums = false;
};

// Two bfloat16 by the low or the high one of `factors`, each rounded.
template <bool kHigh>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t factors) {
#ifdef CANDLE_MOE_EMULATOR
    const float factor = low_of<__nv_bfloat16>(kHigh ? factors >> 16 : factors);
    const auto rounded = [&](uint32_t v) {
        return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(low_of<__nv_bfloat16>(v) * factor)));
    };
    return rounded(a) | rounded(a >> 16) << 16;
#else
    // fma, since mul needs compute capability 9.0; -0 keeps the sign of zero. Which half it is costs nothing.
    uint32_t product;
#define MOE_MULTIPLY_PAIR(HALF)                                                    \
    asm("{\n.reg .b16 low, high;\n.reg .b32 factor;\nmov.b32 {low, high}, %2;\n"   \
        "mov.b32 factor, {" HALF ", " HALF "};\n"                                  \
        "fma.rn.bf16x2 %0, %1, factor, %3;\n}"                                     \
        : "=r"(product)                                                            \
        : "r"(a), "r"(factors), "r"(0x80008000u))
    if constexpr (kHigh) {
        MOE_MULTIPLY_PAIR("high");
    } else {
        MOE_MULTIPLY_PAIR("low");
    }
    return product;
#endif
}

// 2^126 twice, as bfloat16: what raw operands lack.
constexpr uint32_t kPairOf126 = 0x7e807e80u;

// 2^126 * 2^(scale - 127), as bfloat16, of each byte of a scale word, for scales up to 128: of rows g in columns 0..32 and
// 32..64, then of rows g + 8.
__device__ __forceinline__ void factors_of_scales(uint32_t word, uint32_t (&factors)[2]) {
    constexpr uint32_t kLacking = 126u * 0x00800080u;
    factors[0] = (word & 0x00ff00ffu) * 128u + kLacking;
    factors[1] = (word >> 8 & 0x00ff00ffu) * 128u + kLacking;
}

// The A operands of a unit's step from raw ones; the factors of columns 32..64 count from step 2 on.
template <int kStep>
__device__ __forceinline__ void scale_operands(uint32_t (&a)[4], const uint32_t (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = multiply_pair<(kStep >= 2)>(a[i], factors[i % 2]);
}

// 2^(scale - 127).
__device__ __forceinline__ float power_of_scale(uint32_t scale) {
    return __uint_as_float(scale == 0 ? 0x00400000u : scale << 23);
}

}  // namespace moe
