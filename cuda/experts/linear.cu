// The linear layer with tensor cores, for matrices in the dtype of the hidden states:
//
//     out[token] = round(W x + b)          W [out_features, in_features], in_features a multiple of 32
//
// The gate of every layer, so it must be fast for one token, and give a token the same bits whatever stands beside it: ranks
// have some of the tokens that one device has all of.
//
// 1. An output has one order of sums, which follows from in_features alone: each of eight warps takes a stretch of the columns and
//    multiplies 16 of them at a time, in order; then the eight sums are added in the order of the warps. How many tokens and
//    features a block has changes nothing of that.
// 2. Nothing is brought to shared memory first. Of 32 columns a lane loads 8 that lie side by side, of its rows of both operands
//    alike, so that every load is 16 bytes; which columns meet in a product does not matter as long as they are the same.
// 3. Few tokens: 16 of them and 8 features a block, so that one token keeps as many blocks busy as there are features / 8, with
//    twelve loads of each lane under way. Many: 32 tokens and up to 64 features, so that both operands are read few times.

#include "common/launch.cuh"
#include "common/matrix.cuh"
#include "experts/projection.cuh"

namespace moe {

constexpr uint32_t kLinearWarps = 8;
constexpr uint32_t kLinearThreads = 32 * kLinearWarps;
constexpr uint32_t kChunk = 32;  // columns

// The words of a lane's 8 columns, of which two products take two each.
__device__ __forceinline__ uint32_t word(const uint4& words, uint32_t i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// kTokens tiles of 16 tokens and kFeatures of 8 features.
template <typename T, int kTokens, int kFeatures, int kAhead>
__device__ __forceinline__ void multiply_all(const ProjectionArguments& a) {
    constexpr uint32_t kSums = kTokens * kFeatures * 4;
    MOE_DYNAMIC_SHARED(float, sums);  // [warp][sum][lane]
    wait_for_previous_kernel();
    allow_next_kernel();
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t bands = (a.out_features + kFeatures * 8 - 1) / (kFeatures * 8);
    const uint32_t first_token = blockIdx.x / bands * (kTokens * 16), first_feature = blockIdx.x % bands * (kFeatures * 8);
    const uint32_t chunks = a.in_features / kChunk;
    const uint32_t begin = warp * chunks / kLinearWarps, end = (warp + 1) * chunks / kLinearWarps;
    // Rows that the block lacks repeat the last one, and are not kept.
    const uint4* tokens[kTokens * 2];
    const uint4* features[kFeatures];
    const uint64_t row_words = a.in_features / 8;
#pragma unroll
    for (int i = 0; i < kTokens * 2; ++i) {
        const uint32_t token = min(first_token + i * 8 + lane / 4, a.num_rows - 1);
        tokens[i] = static_cast<const uint4*>(a.input) + token * row_words + lane % 4;
    }
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
        const uint32_t feature = min(first_feature + i * 8 + lane / 4, a.out_features - 1);
        features[i] = static_cast<const uint4*>(a.weights) + feature * row_words + lane % 4;
    }
    float c[kTokens][kFeatures][4] = {};
    const auto multiply = [&](const uint4 (&x)[kTokens * 2], const uint4 (&w)[kFeatures]) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
                const uint32_t operand[4] = {word(x[2 * i], 2 * step), word(x[2 * i + 1], 2 * step),
                                             word(x[2 * i], 2 * step + 1), word(x[2 * i + 1], 2 * step + 1)};
#pragma unroll
                for (int j = 0; j < kFeatures; ++j) {
                    const uint32_t other[2] = {word(w[j], 2 * step), word(w[j], 2 * step + 1)};
                    mma_16x8x16<T>(c[i][j], operand, other);
                }
            }
        }
    };
    const auto multiply_some = [&](uint32_t chunk, bool all) {
        uint4 x[kAhead][kTokens * 2], w[kAhead][kFeatures];
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
            // Behind the end the last chunk again, which is not multiplied.
            const uint64_t column = uint64_t(all ? chunk + ahead : min(chunk + ahead, end - 1)) * (kChunk / 8);
#pragma unroll
            for (int i = 0; i < kTokens * 2; ++i) x[ahead][i] = tokens[i][column];
#pragma unroll
            for (int i = 0; i < kFeatures; ++i) w[ahead][i] = features[i][column];
        }
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
            if (all || chunk + ahead < end) multiply(x[ahead], w[ahead]);
        }
    };
    uint32_t chunk = begin;
    for (; chunk + kAhead <= end; chunk += kAhead) multiply_some(chunk, true);
    if (chunk < end) multiply_some(chunk, false);
#pragma unroll
    for (uint32_t i = 0; i < kSums; ++i) {
        sums[(warp * kSums + i) * 32 + lane] = c[i / 4 / kFeatures][i / 4 % kFeatures][i % 4];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kSums * 32; i += kLinearThreads) {
        const uint32_t of_lane = i % 32, part = i / 32 % 4, tile = i / 128;
        const uint32_t token = first_token + tile / kFeatures * 16 + of_lane / 4 + part / 2 * 8;
        const uint32_t feature = first_feature + tile % kFeatures * 8 + of_lane % 4 * 2 + part % 2;
        if (token >= a.num_rows || feature >= a.out_features) continue;
        float sum = sums[i];
#pragma unroll
        for (uint32_t other = 1; other < kLinearWarps; ++other) sum = __fadd_rn(sum, sums[other * kSums * 32 + i]);
        if (a.bias != nullptr) sum = __fadd_rn(sum, a.bias[feature]);
        keep(static_cast<T*>(a.output) + uint64_t(token) * a.out_features + feature, sum);
    }
}

}  // namespace moe

#define LINEAR(T, NAME, TOKENS, FEATURES, AHEAD)                                                             \
    extern "C" __global__ void __launch_bounds__(moe::kLinearThreads) linear_##NAME##_##TOKENS##x##FEATURES( \
        const __grid_constant__ moe::ProjectionArguments a) {                                                \
        moe::multiply_all<T, TOKENS, FEATURES, AHEAD>(a);                                                    \
    }
LINEAR(__half, f16, 1, 1, 4)
LINEAR(__half, f16, 2, 4, 2)
LINEAR(__half, f16, 2, 8, 1)
LINEAR(__nv_bfloat16, bf16, 1, 1, 4)
LINEAR(__nv_bfloat16, bf16, 2, 4, 2)
LINEAR(__nv_bfloat16, bf16, 2, 8, 1)
