// The arithmetic of routing, operation for operation that of the CPU (src/routing/cpu.rs): compiled without fused
// multiply-add and with exact division and square root, it gives the same bits, and so the same choices.
#pragma once

#include <cstdint>

namespace moe {

constexpr float kInf = __builtin_huge_valf();
// What MiniMax-M2 and DeepSeek-V3 add to the sum of the chosen sigmoids.
constexpr float kEpsilon = 1e-20f;
// Below this logit, 1 + e^l is 1 in float32, and sigmoid(l) and softplus(l) are e^l.
constexpr float kSigmoidIsExp = -20.0f;

// The larger of two, NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#ifdef CANDLE_MOE_EMULATOR
    return a != a || a > b ? a : b;
#else
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#endif
}

// e^x for x <= 0; NaN stays NaN. Without a branch, so that a lane's experts go side by side.
__device__ __forceinline__ float exp_of(float x) {
    x = max_or_nan(x, -104.0f);  // e^-104 is 0
    constexpr float kRound = 12582912.0f;
    const float rounded = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), kRound), n = __fadd_rn(rounded, -kRound);
    const float r = __fadd_rn(__fadd_rn(x, -__fmul_rn(n, 0.6933594f)), -__fmul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666666e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5000001f);
    const float e_r = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    // 2^n in two steps, of which the first is exact: n, in the low bits of `rounded`, may be as low as -150.
    const uint32_t power = (__float_as_uint(rounded) - __float_as_uint(kRound) + 64 + 127) << 23;
    return __fmul_rn(__fmul_rn(e_r, 5.42101086242752217e-20f), __uint_as_float(power));
}

__device__ __forceinline__ float reciprocal_estimate(float v) {
#ifdef CANDLE_MOE_EMULATOR
    return 1.0f / v;
#else
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
#endif
}

// a / b, correctly rounded, for 0 <= a <= b and b in 1..=4 with b a power of two where a is below 2^-25: neither the quotient
// nor a remainder loses bits then, and the branch of the general division is not needed.
__device__ __forceinline__ float divide_in_range(float a, float b) {
    float r = reciprocal_estimate(b);
    r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.0f), r);
    float q = __fmul_rn(a, r);
    q = __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
    return __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
}

__device__ __forceinline__ float sigmoid(float logit) {
    const float e = exp_of(-fabsf(logit));
    return divide_in_range(logit >= 0.0f ? 1.0f : e, __fadd_rn(1.0f, e));
}

__device__ __forceinline__ float sigmoid_or_zero(float logit) { return logit != logit ? 0.0f : sigmoid(logit); }

// ln(1 + y) for y in 0..1.
__device__ __forceinline__ float ln_1p(float y) {
    const float z = divide_in_range(y, __fadd_rn(2.0f, y));
    const float square = __fmul_rn(z, z);
    float p = 1.0f / 15.0f;
    p = __fadd_rn(__fmul_rn(p, square), 1.0f / 13.0f);
    p = __fadd_rn(__fmul_rn(p, square), 1.0f / 11.0f);
    p = __fadd_rn(__fmul_rn(p, square), 1.0f / 9.0f);
    p = __fadd_rn(__fmul_rn(p, square), 1.0f / 7.0f);
    p = __fadd_rn(__fmul_rn(p, square), 1.0f / 5.0f);
    p = __fadd_rn(__fmul_rn(p, square), 1.0f / 3.0f);
    const float z2 = __fadd_rn(z, z);
    return __fadd_rn(z2, __fmul_rn(z2, __fmul_rn(square, p)));
}

__device__ __forceinline__ float root_softplus(float logit) {
    const float tail = ln_1p(exp_of(-fabsf(logit)));
    return __fsqrt_rn(logit > 0.0f ? __fadd_rn(logit, tail) : tail);
}

// The part of a logit in a softmax whose largest logit is `best`, before the division; see share() of the CPU.
__device__ __forceinline__ float share(float logit, float best) {
    if (best != best || best == -kInf || logit == best) return 1.0f;
    return logit < best && best < kInf ? exp_of(__fadd_rn(logit, -best)) : 0.0f;
}

}  // namespace moe
