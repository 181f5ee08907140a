// What blocks tell each other through numbers in device memory.
#pragma once

#include <cstdint>

namespace moe {

// A number, and behind it what was written before it was (add_release).
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    emulator::yield();
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#else
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
#endif
}

// Adds 1, behind everything that this thread, and those that it has met at a barrier, have written.
__device__ __forceinline__ void add_release(uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    __atomic_fetch_add(at, 1u, __ATOMIC_RELEASE);
#else
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
#endif
}

// The same, giving the number before; what others have added behind is seen after it.
__device__ __forceinline__ uint32_t add_and_see(uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    return __atomic_fetch_add(at, 1u, __ATOMIC_ACQ_REL);
#else
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
#endif
}

}  // namespace moe
