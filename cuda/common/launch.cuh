// What a launch gives a kernel: dynamic shared memory, clusters of blocks, and the next kernel of the stream starting early
// (programmatic dependent launch). Below compute capability 9.0 a cluster is one block, and kernels follow each other whole;
// the host asks for neither there.
#pragma once

#include <cstdint>

// The dynamic shared memory of the block, 128-byte aligned: an asynchronous copy of 16 bytes takes twice as long where sectors of
// 32 bytes do not begin where they began in device memory.
#ifdef CANDLE_MOE_EMULATOR
#define MOE_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulator::dynamic_shared())
#else
#define MOE_DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(128) unsigned char moe_dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(moe_dynamic_shared)
#endif

namespace moe {

#ifdef CANDLE_MOE_EMULATOR

__device__ __forceinline__ void allow_next_kernel() {}
__device__ __forceinline__ void wait_for_previous_kernel() {}
__device__ __forceinline__ uint32_t cluster_rank() { return emulator::cluster_rank(); }
__device__ __forceinline__ uint32_t cluster_size() { return emulator::cluster_size(); }
__device__ __forceinline__ void cluster_sync() { emulator::cluster_sync(); }
template <typename T>
__device__ __forceinline__ const T* in_block(const T* mine, uint32_t rank) {
    return static_cast<const T*>(emulator::cluster_address(const_cast<T*>(mine), rank));
}

#elif __CUDA_ARCH__ >= 900

// Lets the next kernel of the stream begin, if it was launched to wait by itself.
__device__ __forceinline__ void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the previous kernel of the stream has ended and its writes are seen.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// All threads of all blocks of the cluster; what was written to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where block `rank` of the cluster has what this block has at `mine` in shared memory.
template <typename T>
__device__ __forceinline__ const T* in_block(const T* mine, uint32_t rank) {
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
    return reinterpret_cast<const T*>(there);
}

#else

__device__ __forceinline__ void allow_next_kernel() {}
__device__ __forceinline__ void wait_for_previous_kernel() {}
__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ const T* in_block(const T* mine, uint32_t) { return mine; }

#endif

}  // namespace moe
