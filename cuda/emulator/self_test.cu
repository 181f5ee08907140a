// Kernels of self_test.cpp: right ones, and one for each mistake that the emulator is to find.
#include <cstdint>

struct SelfTest {
    uint32_t* out;
    uint32_t* in;
    uint32_t n;
};

constexpr unsigned kAll = 0xffffffffu;

template <typename T, int kSize> __device__ T* two_arrays(T value) {
    __shared__ T first[kSize], second[kSize * 2];
    first[threadIdx.x % kSize] = value;
    second[threadIdx.x % kSize] = first[threadIdx.x % kSize];
    return second;
}

// Sums over warps and blocks by all means there are: out[block] = sum of the threads' numbers, in several ways.
extern "C" __global__ void __launch_bounds__(256) self_test_sums(const SelfTest a) {
    extern __shared__ uint32_t by_warp[];
    __shared__ uint32_t total;
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    uint32_t down = i, across = i;
    for (int d = 16; d > 0; d /= 2) down += __shfl_down_sync(kAll, down, d);
    for (int d = 16; d > 0; d /= 2) across += __shfl_xor_sync(kAll, across, d);
    const uint32_t reduced = __reduce_add_sync(kAll, i);
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    if (lane == 0) by_warp[threadIdx.x / 32] = down + __shfl_sync(1, across, 0) + reduced;
    atomicAdd(&total, i);
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t sum = total;
        for (uint32_t w = 0; w < blockDim.x / 32; ++w) sum += by_warp[w];
        a.out[blockIdx.x] = sum;
    }
    if (__syncthreads_count(lane == 0) != blockDim.x / 32) __trap();
    atomicAdd(a.out + blockIdx.x, i);
    if (__match_any_sync(kAll, lane / 8) != 0xffu << lane / 8 * 8) __trap();
    if (__ballot_sync(kAll, lane & 1) != 0xaaaaaaaau) __trap();
    // Half of the warp has left.
    if (lane >= 16) return;
    const uint32_t low = __shfl_up_sync(0xffffu, i, 1, 8);
    if (low != (lane % 8 == 0 ? i : i - 1)) __trap();
    uint32_t* more = two_arrays<uint32_t, 256>(i);
    atomicAdd(a.out + blockIdx.x, more[threadIdx.x] * 2 + 16);
}

// out[block] = rank of the next block of its cluster, read from that block's shared memory.
extern "C" __global__ void self_test_cluster(const SelfTest a) {
    extern __shared__ uint32_t shared[];
    __shared__ uint32_t fixed;
    const uint32_t rank = emulator::cluster_rank(), next = (rank + 1) % emulator::cluster_size();
    if (threadIdx.x == 0) shared[0] = fixed = rank;
    emulator::cluster_sync();
    const uint32_t found = *emulator::cluster_address(shared, next) * 100 + *emulator::cluster_address(&fixed, next);
    emulator::cluster_sync();
    if (threadIdx.x == 0) a.out[blockIdx.x] = found;
}

// Each block waits for the one before it.
extern "C" __global__ void self_test_chain(const SelfTest a) {
    if (threadIdx.x != 0) return;
    while (atomicCAS(a.out, blockIdx.x, blockIdx.x + 1) != blockIdx.x) {
    }
}

extern "C" __global__ void self_test_past_the_end(const SelfTest a) { a.out[a.n + threadIdx.x] = 1; }

extern "C" __global__ void self_test_shared_past_the_end(const SelfTest a) {
    extern __shared__ uint32_t shared[];
    shared[a.n] = 1;
}

extern "C" __global__ void self_test_not_aligned(const SelfTest a) {
    *reinterpret_cast<uint4*>(a.out + 1) = uint4{0, 0, 0, 0};
}

extern "C" __global__ void self_test_array_index(const SelfTest a) {
    uint32_t numbers[4] = {1, 2, 3, 4};
    a.out[0] = numbers[a.n % 64];
}

extern "C" __global__ void self_test_absent_lane(const SelfTest a) {
    if (threadIdx.x == 3) return;
    a.out[threadIdx.x] = __reduce_add_sync(kAll, 1u);
}

extern "C" __global__ void self_test_different_collectives(const SelfTest a) {
    if (threadIdx.x % 2 == 0) {
        a.out[threadIdx.x] = __ballot_sync(kAll, 1);
    } else {
        a.out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
    }
}

extern "C" __global__ void self_test_deadlock(const SelfTest) {
    if (threadIdx.x == 0) __syncwarp();
    __syncthreads();
}

// What a benchmark loads as PTX to see what a launch costs.
extern "C" __global__ void empty() {}
