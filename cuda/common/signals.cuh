// What blocks tell each other through numbers in device memory; and devices, and the host, through such as all of them see.
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

// Adds 1; what was done before by the threads that this one has met is behind it, and what is done after is behind what others had
// done before they did the same.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    return __atomic_fetch_add(at, 1u, __ATOMIC_ACQ_REL);
#else
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
#endif
}

// The same between devices and with the host.
__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    emulator::yield_to_other_devices();
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#else
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
#endif
}

__device__ __forceinline__ uint32_t load_relaxed_system(const uint32_t* at) {
#ifdef CANDLE_MOE_EMULATOR
    return __atomic_load_n(at, __ATOMIC_RELAXED);
#else
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
#endif
}

__device__ __forceinline__ void store_relaxed_system(uint32_t* at, uint32_t value) {
#ifdef CANDLE_MOE_EMULATOR
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
#else
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#endif
}

// Behind everything that this thread, and those that it has met at a barrier, have written or seen.
__device__ __forceinline__ void store_release_system(uint32_t* at, uint32_t value) {
#ifdef CANDLE_MOE_EMULATOR
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
#else
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#endif
}

}  // namespace moe
