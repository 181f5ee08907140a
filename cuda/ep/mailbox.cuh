// How devices of one process meet in the middle of a kernel: flags in their memory, which the others write.
//
//     come     heard[rank] of every rank's mailbox = round     behind everything that the stream has written before
//     wait     until the own heard[r] is round for every r     what they wrote before is seen after
//
// 1. Rounds are counted in the mailbox, by the kernels themselves: a graph that is replayed takes the next ones, and the host
//    need not know them. All ranks make the same rounds in the same order.
// 2. A flag is written by one rank and never decreases, so nobody resets it, and a rank that is one round ahead does no harm.
// 3. Nobody traps. Who waits for long looks at a word of the host, which gives the group up, and says there for whom it waits;
//    then the kernel ends, and what it leaves is worth nothing.
#pragma once

#include "common/launch.cuh"
#include "common/signals.cuh"

#include <cstdint>

namespace moe {

constexpr uint32_t kMaxRanks = 16;
// Looks at a flag between looks at the host's word, which lies behind the bus.
constexpr uint32_t kPatience = 256;

// In plain memory of each device, all zero at first.
struct Mailbox {
    uint32_t heard[kMaxRanks];  // the last round that each rank has come to
    uint32_t round;             // the last round that this rank has ended
    uint32_t ended;             // blocks of the present round that have ended
};

// In memory of the host.
struct Lifeline {
    uint32_t given_up;            // not 0: the host says that nobody comes any more
    uint32_t waiting[kMaxRanks];  // not 0: the round for which this rank has waited long, by rank that did not come
};

struct Group {
    Mailbox* mailboxes[kMaxRanks];
    Lifeline* lifeline;
    uint32_t rank;
    uint32_t num_ranks;
};

__device__ __forceinline__ Mailbox& own_mailbox(const Group& g) { return *g.mailboxes[g.rank]; }

// The round that this kernel is. No block ends it before all have asked.
__device__ __forceinline__ uint32_t present_round(const Group& g) { return own_mailbox(g).round + 1; }

// Tells the ranks; for one block.
__device__ __forceinline__ void come(const Group& g, uint32_t round) {
    if (threadIdx.x < g.num_ranks) store_release_system(&g.mailboxes[threadIdx.x]->heard[g.rank], round);
}

// Waits for one rank. Rounds may go round.
__device__ __forceinline__ void wait_for(const Group& g, uint32_t rank, uint32_t round) {
    const uint32_t* heard = &own_mailbox(g).heard[rank];
    bool is_long = false;
    for (uint32_t looks = 1; static_cast<int32_t>(load_acquire_system(heard) - round) < 0; ++looks) {
        if (looks % kPatience != 0) continue;
        if (!is_long) store_relaxed_system(&g.lifeline->waiting[rank], round);
        is_long = true;
        if (load_relaxed_system(&g.lifeline->given_up) != 0) return;
    }
    if (is_long) store_relaxed_system(&g.lifeline->waiting[rank], 0);
}

// Waits for all ranks, all threads of the block.
__device__ __forceinline__ void wait_for_ranks(const Group& g, uint32_t round) {
    if (threadIdx.x < g.num_ranks) wait_for(g, threadIdx.x, round);
    __syncthreads();
}

// Whether this is the last block to come here; then everything that the others did before lies behind it.
__device__ __forceinline__ bool is_last_block(const Group& g) {
    __shared__ uint32_t before;
    __syncthreads();
    if (gridDim.x == 1) return true;
    if (threadIdx.x == 0) before = add_acquire_release(&own_mailbox(g).ended);
    __syncthreads();
    return before + 1 == gridDim.x;
}

// Notes that this block knows the round; the last one to do so ends it. For one thread of each block.
__device__ __forceinline__ void let_round_end(const Group& g, uint32_t round) {
    Mailbox& own = own_mailbox(g);
    if (gridDim.x > 1 && atomicAdd(&own.ended, 1u) + 1 != gridDim.x) return;
    own.ended = 0;
    own.round = round;
}

// For the last block alone.
__device__ __forceinline__ void end_round(const Group& g, uint32_t round) {
    if (threadIdx.x != 0) return;
    own_mailbox(g).ended = 0;
    own_mailbox(g).round = round;
}

// Where experts are: rank r has those from first[r] on, up to those of the next.
struct Owners {
    uint32_t first[kMaxRanks + 1];
};

// The rank that has the expert; one that there is not, such as that of padding, is nobody's: num_ranks.
__device__ __forceinline__ uint32_t owner_of(const Owners& owners, uint32_t num_ranks, uint32_t expert) {
    uint32_t owner = 0;
    for (uint32_t rank = 1; rank <= num_ranks; ++rank) owner += expert >= owners.first[rank];
    return owner;
}

}  // namespace moe
