// Barriers in shared memory that count arrivals, of threads and of their copies. Compute capability 8.0.
#pragma once

#include "common/matrix.cuh"

namespace moe {

// The phases of a barrier, numbered from 0, end one after another, each with the last of its arrivals.
constexpr uint32_t kBarrierBytes = 8;

#ifdef CANDLE_MOE_EMULATOR

// State of a barrier: arrivals that the phase still needs, arrivals of each phase << 16, number of the phase << 32.
__device__ __forceinline__ void start_barrier(SharedAddress barrier, uint32_t arrivals) {
    *reinterpret_cast<uint64_t*>(barrier) = uint64_t(arrivals) << 16 | arrivals;
}
__device__ __forceinline__ void arrive(SharedAddress barrier) {
    uint64_t& state = *reinterpret_cast<uint64_t*>(barrier);
    const uint64_t arrivals = state >> 16 & 0xffffu, left = (state & 0xffffu) - 1;
    state = left > 0 ? state - 1 : ((state >> 32) + 1) << 32 | arrivals << 16 | arrivals;
}
__device__ __forceinline__ void wait_for_phase(SharedAddress barrier, uint32_t parity) {
    while ((*reinterpret_cast<volatile uint64_t*>(barrier) >> 32 & 1) == parity) emulator::yield();
}
__device__ __forceinline__ void arrive_behind_copies(SharedAddress barrier) { arrive(barrier); }

#else

// For `arrivals` in each phase. A barrier of the block stands between this and the first use.
__device__ __forceinline__ void start_barrier(SharedAddress barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What this thread did before is seen by those that have waited for the phase.
__device__ __forceinline__ void arrive(SharedAddress barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// Arrives when the copies are there that this thread has begun (copy_16).
__device__ __forceinline__ void arrive_behind_copies(SharedAddress barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits until a phase has ended whose number has this parity; the phase before the first counts as one of parity 1.
__device__ __forceinline__ void wait_for_phase(SharedAddress barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define MOE_LOOK_AT_PHASE "mbarrier.try_wait.parity.shared::cta.b64"  // and waits a while
#else
#define MOE_LOOK_AT_PHASE "mbarrier.test_wait.parity.shared::cta.b64"
#endif
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n" MOE_LOOK_AT_PHASE " ended, [%0], %1;\n"
        "@ended bra done;\n"
        "bra again;\n"
        "done:\n"
        "}" ::"r"(barrier), "r"(parity)
        : "memory");
}

#endif

}  // namespace moe
