// The gradient of routing: from that of topk_weights [num_tokens, top_k] to that of router_logits [num_tokens, num_experts],
// contiguous and in the logits' dtype. The choice itself has no gradient.
//
// One warp per token: the row is filled first, with 0 or with what a softmax over all experts gives, then the chosen experts
// are written. src/routing/cpu.rs has the formulas.

#include "routing/topk.cuh"

namespace moe {

struct BackwardArguments {
    const void* logits;
    const uint32_t* topk_ids;    // [num_tokens, top_k]
    const float* topk_weights;   // [num_tokens, top_k]
    const float* grad_weights;   // [num_tokens, top_k]
    void* grad_logits;           // [num_tokens, num_experts]
    int64_t stride_token;
    int64_t stride_expert;
    uint64_t num_tokens;
    uint32_t num_experts;
    uint32_t top_k;
    int32_t weight;
    float factor;
};

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// The derivative of ln(sqrt(softplus(l))), which is sigmoid(l) / (2 softplus(l)); below, both are e^l.
__device__ __forceinline__ float root_softplus_slope(float logit) {
    if (logit != logit || logit < kSigmoidIsExp) return 0.5f;
    const float root = root_softplus(logit);
    return __fdiv_rn(sigmoid(logit), 2.0f * (root * root));
}

// How the weight `w` of a chosen logit moves with it, where `g` is the weight's gradient and `mean` that of all weights.
__device__ __forceinline__ float gradient(int weight, float factor, float logit, float w, float g, float mean) {
    switch (weight) {
        case kSigmoidAlone: return g * w * (1.0f - w);
        case kSigmoidRenorm: return w * (1.0f - sigmoid_or_zero(logit)) * (g - mean);
        case kSigmoidOverSum: return w * (1.0f - sigmoid_or_zero(logit)) * (g - __fdiv_rn(mean, factor));
        case kRootSoftplusOverSum: return w * root_softplus_slope(logit) * (g - __fdiv_rn(mean, factor));
        default: return w * (g - mean);
    }
}

template <typename T>
__device__ __forceinline__ void backward_row(const BackwardArguments& a) {
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t token = uint64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (token >= a.num_tokens) return;
    const T* const row = static_cast<const T*>(a.logits) + int64_t(token) * a.stride_token;
    T* const out = static_cast<T*>(a.grad_logits) + token * a.num_experts;
    const uint32_t* const ids = a.topk_ids + token * a.top_k;
    const float* const weights = a.topk_weights + token * a.top_k;
    const float* const grad = a.grad_weights + token * a.top_k;
    const auto logit_of = [&](uint32_t expert) { return to_float(row[int64_t(expert) * a.stride_expert]); };

    const bool is_padding = ids[0] == kNoExpert;
    float top = __uint_as_float(0x7fc00000u), mean = 0.0f;
    if (!is_padding) {
        for (uint32_t k = lane; k < a.top_k; k += 32) {
            top = fmaxf(top, logit_of(ids[k]));
            mean += weights[k] * grad[k];
        }
    }
    top = warp_max_number(top);
    mean = warp_sum(mean);
    // Weights that are multiplied by 0 cannot move, nor can those of a row without a finite best.
    const bool moves = fabsf(top) < kInf && a.factor != 0.0f;
    const float best = moves && a.weight == kDefault ? logit_of(ids[0]) : 0.0f;
    float denominator = 1.0f;
    if (moves && a.weight == kDefault) {
        double sum = 0.0;
        for (uint32_t e = lane; e < a.num_experts; e += 32) sum += share(logit_of(e), best);
        denominator = static_cast<float>(warp_sum(sum));
    }
    const auto unchosen = [&](uint32_t e) {
        return moves && a.weight == kDefault ? -mean * __fdiv_rn(share(logit_of(e), best), denominator) : 0.0f;
    };
    for (uint32_t e = lane; e < a.num_experts; e += 32) store(out + e, unchosen(e));
    if (!moves) return;
    __syncwarp();
    for (uint32_t k = lane; k < a.top_k; k += 32) {
        const uint32_t e = ids[k];
        const float w = weights[k], g = grad[k];
        store(out + e, a.weight == kDefault ? unchosen(e) + w * g : gradient(a.weight, a.factor, logit_of(e), w, g, mean));
    }
}

}  // namespace moe

#define BACKWARD(T, NAME)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) backward_##NAME(const moe::BackwardArguments a) {            \
        moe::backward_row<T>(a);                                                                                   \
    }
BACKWARD(float, f32)
BACKWARD(__half, f16)
BACKWARD(__nv_bfloat16, bf16)
