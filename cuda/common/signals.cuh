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

// A number alone; see_what_was_released() stands behind it.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    return __atomic_load_n(at, __ATOMIC_RELAXED);
#else
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
#endif
}

// What was written before a number that this thread has loaded was released is seen after it.
__device__ __forceinline__ void see_what_was_released() {
#ifdef CANDLE_MOE_EMULATOR
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
#else
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// Between two looks at a number that another thread changes.
__device__ __forceinline__ void pause() {
#ifdef CANDLE_MOE_EMULATOR
    emulator::yield();
#else
    __nanosleep(20);
#endif
}

// A number in shared memory that another warp changes.
__device__ __forceinline__ uint32_t see_shared(const uint32_t* at) { return *static_cast<const volatile uint32_t*>(at); }
__device__ __forceinline__ void show_shared(uint32_t* at, uint32_t value) { *static_cast<volatile uint32_t*>(at) = value; }

// Adds 1, behind everything that this thread, and those that it has met at a barrier, have written.
__device__ __forceinline__ void add_release(uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    __atomic_fetch_add(at, 1u, __ATOMIC_RELEASE);
#else
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
#endif
}

}  // namespace moe
