// What a block of one rank does besides routing, experts and sums.
//
//     count_slots    slots[e] += expert_counts[e], one thread per expert
//     shared_slots   ids[token][e] = e, or kNoExpert for padding; weights = 1, one thread per slot of a shared expert

#include <cstdint>

namespace moe {

// The id of no expert, in each slot of a token that is padding.
constexpr uint32_t kNoExpert = 0xffffffffu;

struct CountArguments {
    const uint32_t* expert_counts;  // [num_experts]
    unsigned long long* slots;      // [num_experts]
    uint64_t num_experts;
};

struct SharedArguments {
    const uint32_t* topk_ids;  // [num_tokens, top_k]
    uint32_t* ids;             // [num_tokens, num_shared]
    float* weights;            // the same
    uint64_t num_slots;        // num_tokens * num_shared
    uint32_t top_k;
    uint32_t num_shared;
};

}  // namespace moe

// Streams of several threads may count at once; whole numbers do not mind the order.
extern "C" __global__ void __launch_bounds__(256) count_slots(const __grid_constant__ moe::CountArguments a) {
    const uint64_t expert = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (expert >= a.num_experts) return;
    const uint32_t count = a.expert_counts[expert];
    if (count != 0) atomicAdd(a.slots + expert, static_cast<unsigned long long>(count));
}

extern "C" __global__ void __launch_bounds__(256) shared_slots(const __grid_constant__ moe::SharedArguments a) {
    const uint64_t slot = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (slot >= a.num_slots) return;
    const uint64_t token = slot / a.num_shared;
    const bool is_padding = a.topk_ids[token * a.top_k] == moe::kNoExpert;
    a.ids[slot] = is_padding ? moe::kNoExpert : static_cast<uint32_t>(slot % a.num_shared);
    a.weights[slot] = 1.0f;
}
