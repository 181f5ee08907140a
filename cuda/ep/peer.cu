// Dispatch and combine between devices that reach each other's memory.
//
//     dispatch   every rank pushes the row of each token to the ranks that have some of its experts, once to each, and the ids and
//                weights of all its tokens to all; the last block comes to the round, and waits for the others, or leaves
//                that to `arrive`, which comes when the stream has done something else meanwhile
//     sums       everybody comes; then each rank pulls, for each of its tokens, the partial sums of the ranks that have some
//                of its experts, and adds them in float32 in rank order
//     rows       the same of the rows of the slots, which are weighted and added in slot order, as on one device
//     meet       nothing but a round
//
// Rows land where all tokens of all ranks have a place, in rank order: shapes follow from numbers of tokens that everybody knows,
// and nothing needs the host. What nobody sent is not read either: the order of a rank names its own slots only.
//
// Two rooms of each kind take turns, and nobody waits for one to be free:
//
// 1. Who comes to a dispatch has waited, in the one before, for everybody to come there; that is behind their reading of the tokens
//    of the second last, whose room is the one that this dispatch fills.
// 2. Results of a combine are written behind the combine before it, where this rank waited for everybody to come; that is behind their
//    pulling of the second last, whose room is the one that is written.
// 3. A dispatch and its combine in turn are safe in one room each: tokens are overwritten behind the combine, for which the reader
//    came when its experts were done, and results behind the next dispatch. So a graph may have an odd number of both.
//
// Why it is fast: one launch each, one flag each way, and the flag of pulling goes out before anything else is looked at. A block has
// a token, and a thread 16 bytes of it, so that the row of a single token is one load deep. Writes over the links are posted; pulling
// has 16 bytes of each thread under way, some 4 MB in all, which is more than the links hold. With many tokens both run at what
// the links give (the copy engine, through shared memory, was no faster).

#include "common/neighbours.cuh"
#include "ep/mailbox.cuh"

namespace moe {

constexpr uint32_t kThreads = 1024;
// Of the kernels that have four rows of a token under way.
constexpr uint32_t kThreadsOfRows = 512;
// The rank of a slot that no local expert has.
constexpr uint32_t kNothing = 0xffffffffu;

struct DispatchArguments {
    Group group;
    Owners owners;
    const void* hidden;         // [num_tokens, units of a row]
    const uint32_t* topk_ids;   // [num_tokens, top_k]
    const float* topk_weights;  // the same
    // Where this rank's tokens begin at each rank.
    void* to_hidden[kMaxRanks];
    uint32_t* to_topk_ids[kMaxRanks];
    float* to_topk_weights[kMaxRanks];
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t row_units;
    uint32_t waits;             // 0: not for the others
};

// Of pulling; also where a rank's tokens begin among those of all, at each rank.
struct CombineArguments {
    Group group;
    Owners owners;
    const void* rows[kMaxRanks];           // sums: this rank's tokens. rows: [all slots, hidden_size]
    const uint32_t* slot_rank[kMaxRanks];  // rows: of this rank's slots, their places among the rows
    const uint32_t* topk_ids;              // [num_tokens, top_k]
    const float* topk_weights;             // rows: the same
    void* sums;                            // [num_tokens, hidden_size]
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t hidden_size;
};

// A bit for each rank that has some of the token's experts.
__device__ __forceinline__ uint32_t ranks_of(
    const Owners& owners, uint32_t num_ranks, const uint32_t* topk_ids, uint32_t top_k) {
    uint32_t ranks = 0;
    for (uint32_t k = 0; k < top_k; ++k) ranks |= 1u << owner_of(owners, num_ranks, topk_ids[k]);
    return ranks & ((1u << num_ranks) - 1);
}

template <typename Unit>
__device__ __forceinline__ void push(const DispatchArguments& a) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const Group& g = a.group;
    const uint32_t round = present_round(g);
    const Unit* hidden = static_cast<const Unit*>(a.hidden);
    for (uint32_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
        const uint64_t row = uint64_t(token) * a.row_units, slots = uint64_t(token) * a.top_k;
        const uint32_t ranks = ranks_of(a.owners, g.num_ranks, a.topk_ids + slots, a.top_k);
        for (uint32_t i = threadIdx.x; i < a.row_units; i += blockDim.x) {
            const Unit unit = hidden[row + i];
            for (uint32_t rest = ranks; rest != 0; rest &= rest - 1) {
                static_cast<Unit*>(a.to_hidden[__ffs(rest) - 1])[row + i] = unit;
            }
        }
        for (uint32_t k = threadIdx.x; k < a.top_k; k += blockDim.x) {
            const uint32_t id = a.topk_ids[slots + k];
            const float weight = a.topk_weights[slots + k];
            for (uint32_t rank = 0; rank < g.num_ranks; ++rank) {
                a.to_topk_ids[rank][slots + k] = id;
                a.to_topk_weights[rank][slots + k] = weight;
            }
        }
    }
    if (!is_last_block(g)) return;
    come(g, round);
    if (a.waits == 0) return;
    wait_for_ranks(g, round);
    end_round(g, round);
}

// The end of a round to which this rank has come; one block.
__device__ __forceinline__ void arrive_all(const Group& g) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const uint32_t round = present_round(g);
    wait_for_ranks(g, round);
    end_round(g, round);
}

// Comes, waits, and has `bring_home` do its tokens, of which it may `look_at` the first before.
template <typename L, typename F>
__device__ __forceinline__ void pull(const CombineArguments& a, L&& look_at, F&& bring_home) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const Group& g = a.group;
    const uint32_t round = present_round(g);
    if (blockIdx.x == 0) come(g, round);
    if (blockIdx.x < a.num_tokens) look_at(blockIdx.x);
    wait_for_ranks(g, round);
    if (threadIdx.x == 32) let_round_end(g, round);
    for (uint32_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
        if (token != blockIdx.x) look_at(token);
        bring_home(token);
    }
}

template <typename Row, typename T, int kWidth>
__device__ __forceinline__ void pull_sums(const CombineArguments& a) {
    const uint32_t columns = a.hidden_size / kWidth;
    uint32_t ranks = 0;
    const auto look_at = [&](uint32_t token) {
        ranks = ranks_of(a.owners, a.group.num_ranks, a.topk_ids + uint64_t(token) * a.top_k, a.top_k);
    };
    pull(a, look_at, [&](uint32_t token) {
        for (uint32_t column = threadIdx.x; column < columns; column += blockDim.x) {
            const uint64_t i = uint64_t(token) * columns + column;
            float sums[kWidth] = {};
#pragma unroll 4
            for (uint32_t rest = ranks; rest != 0; rest &= rest - 1) {
                const auto part = static_cast<const Neighbours<Row, kWidth>*>(a.rows[__ffs(rest) - 1])[i];
#pragma unroll
                for (int j = 0; j < kWidth; ++j) sums[j] = __fadd_rn(sums[j], to_float(part.of[j]));
            }
            Neighbours<T, kWidth> out;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) keep(out.of + j, sums[j]);
            static_cast<Neighbours<T, kWidth>*>(a.sums)[i] = out;
        }
    });
}

// Slots of a token whose rows are asked for before the first is added.
constexpr uint32_t kAhead = 4;

template <typename Row, typename T, int kWidth>
__device__ __forceinline__ void pull_rows(const CombineArguments& a) {
    const uint32_t columns = a.hidden_size / kWidth, num_ranks = a.group.num_ranks;
    using RowPart = Neighbours<Row, kWidth>;
    pull(a, [](uint32_t) {}, [&](uint32_t token) {
        const uint64_t slots = uint64_t(token) * a.top_k;
        for (uint32_t column = threadIdx.x; column < columns; column += blockDim.x) {
            float sums[kWidth] = {};
            for (uint32_t first = 0; first < a.top_k; first += kAhead) {
                const RowPart* rows[kAhead];
                float weights[kAhead];
#pragma unroll
                for (uint32_t k = 0; k < kAhead; ++k) {
                    rows[k] = nullptr;
                    if (first + k >= a.top_k) continue;
                    const uint64_t slot = slots + first + k;
                    const uint32_t owner = owner_of(a.owners, num_ranks, a.topk_ids[slot]);
                    if (owner == num_ranks) continue;
                    const uint32_t place = a.slot_rank[owner][slot];
                    if (place == kNothing) continue;
                    rows[k] = static_cast<const RowPart*>(a.rows[owner]) + uint64_t(place) * columns + column;
                    weights[k] = a.topk_weights[slot];
                }
                RowPart parts[kAhead];
#pragma unroll
                for (uint32_t k = 0; k < kAhead; ++k) {
                    if (rows[k] != nullptr) parts[k] = *rows[k];
                }
#pragma unroll
                for (uint32_t k = 0; k < kAhead; ++k) {
                    if (rows[k] == nullptr) continue;
#pragma unroll
                    for (int j = 0; j < kWidth; ++j) {
                        sums[j] = __fadd_rn(sums[j], __fmul_rn(weights[k], to_float(parts[k].of[j])));
                    }
                }
            }
            Neighbours<T, kWidth> out;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) keep(out.of + j, sums[j]);
            static_cast<Neighbours<T, kWidth>*>(a.sums)[uint64_t(token) * columns + column] = out;
        }
    });
}

}  // namespace moe

#define PUSH(UNIT, BYTES)                                                                                            \
    extern "C" __global__ void __launch_bounds__(moe::kThreads) peer_dispatch_##BYTES(                               \
        const __grid_constant__ moe::DispatchArguments a) {                                                          \
        moe::push<UNIT>(a);                                                                                          \
    }
PUSH(uint4, 16)
PUSH(uint32_t, 4)
PUSH(uint16_t, 2)

#define PULL(ROW, ROW_NAME, T, NAME, WIDTH)                                                                          \
    extern "C" __global__ void __launch_bounds__(moe::kThreads) peer_sums_##ROW_NAME##_##NAME##_##WIDTH(             \
        const __grid_constant__ moe::CombineArguments a) {                                                           \
        moe::pull_sums<ROW, T, WIDTH>(a);                                                                            \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(moe::kThreadsOfRows) peer_rows_##ROW_NAME##_##NAME##_##WIDTH(             \
        const __grid_constant__ moe::CombineArguments a) {                                                           \
        moe::pull_rows<ROW, T, WIDTH>(a);                                                                            \
    }
PULL(float, f32, float, f32, 4)
PULL(float, f32, float, f32, 1)
PULL(float, f32, __half, f16, 4)
PULL(float, f32, __half, f16, 1)
PULL(float, f32, __nv_bfloat16, bf16, 4)
PULL(float, f32, __nv_bfloat16, bf16, 1)
PULL(__half, f16, float, f32, 8)
PULL(__half, f16, float, f32, 1)
PULL(__half, f16, __half, f16, 8)
PULL(__half, f16, __half, f16, 1)
PULL(__nv_bfloat16, bf16, float, f32, 8)
PULL(__nv_bfloat16, bf16, float, f32, 1)
PULL(__nv_bfloat16, bf16, __nv_bfloat16, bf16, 8)
PULL(__nv_bfloat16, bf16, __nv_bfloat16, bf16, 1)

extern "C" __global__ void __launch_bounds__(32) peer_meet(const __grid_constant__ moe::Group g) {
    moe::wait_for_previous_kernel();
    const uint32_t round = moe::present_round(g);
    moe::come(g, round);
    moe::wait_for_ranks(g, round);
    moe::end_round(g, round);
}
extern "C" __global__ void __launch_bounds__(32) peer_arrive(const __grid_constant__ moe::Group g) { moe::arrive_all(g); }
