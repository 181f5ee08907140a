// Tensor cores and asynchronous copies: one name for an instruction, with its lanes said once, and what the emulated driver
// does instead. Compute capability 8.0.
//
// Fragments of m16n8k16, lane = 4 g + t with g in 0..8, t in 0..4; registers hold two 16-bit elements, the lower index low:
//
//     a[0]  rows g      columns 2t, 2t+1         b[0]  rows (k) 2t, 2t+1      column g
//     a[1]  rows g + 8  columns 2t, 2t+1         b[1]  rows (k) 2t+8, 2t+9    column g
//     a[2]  rows g      columns 2t+8, 2t+9
//     a[3]  rows g + 8  columns 2t+8, 2t+9       c[0], c[1]  row g,     columns 2t, 2t+1
//                                                c[2], c[3]  row g + 8, columns 2t, 2t+1
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/keys.cuh"

namespace moe {

template <typename T>
__device__ __forceinline__ float low_of(uint32_t pair);
template <>
__device__ __forceinline__ float low_of<__nv_bfloat16>(uint32_t pair) { return __uint_as_float(pair << 16); }
template <>
__device__ __forceinline__ float low_of<__half>(uint32_t pair) { return __half2float(__ushort_as_half(pair & 0xffffu)); }

// An address in shared memory.
#ifdef CANDLE_MOE_EMULATOR
using SharedAddress = unsigned char*;
__device__ __forceinline__ SharedAddress shared_address(void* at) { return static_cast<unsigned char*>(at); }
#else
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
#endif

#ifdef CANDLE_MOE_EMULATOR

// c += a b, through a copy of the fragments in shared memory.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    __shared__ uint32_t all[32][32][6];
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t(*const warp)[6] = all[threadIdx.x / 32];
    for (int i = 0; i < 4; ++i) warp[lane][i] = a[i];
    for (int i = 0; i < 2; ++i) warp[lane][4 + i] = b[i];
    __syncwarp();
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = g + i / 2 * 8, column = 2 * t + i % 2;
        double sum = c[i];
        for (uint32_t k = 0; k < 16; ++k) {
            const uint32_t x = warp[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], y = warp[column * 4 + k % 8 / 2][4 + k / 8];
            sum += double(low_of<T>(x >> (16 * (k % 2)))) * low_of<T>(y >> (16 * (k % 2)));
        }
        c[i] = static_cast<float>(sum);
    }
    __syncwarp();
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and gets of matrix i the
// elements 2t, 2t+1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], SharedAddress row) {
    __shared__ SharedAddress rows[32][32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    emulator::check_alignment(row, 16);
    rows[warp][lane] = row;
    __syncwarp();
    for (uint32_t i = 0; i < 4; ++i) out[i] = reinterpret_cast<const uint32_t*>(rows[warp][i * 8 + lane / 4])[lane % 4];
    __syncwarp();
}

// An 8 x 8 matrix of 16-bit elements, of which lane 4g + t has those of row g in columns 2t, 2t+1, and gets those of column g
// in rows 2t, 2t+1.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t pair) {
    __shared__ uint32_t all[32][32];
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t(&pairs)[32] = all[threadIdx.x / 32];
    pairs[lane] = pair;
    __syncwarp();
    const auto element = [&](uint32_t row) { return pairs[row * 4 + g / 2] >> (16 * (g % 2)) & 0xffffu; };
    const uint32_t transposed = element(2 * t) | element(2 * t + 1) << 16;
    __syncwarp();
    return transposed;
}

__device__ __forceinline__ uint4 load_shared_16(SharedAddress from) {
    emulator::check_alignment(from, 16);
    return *reinterpret_cast<const uint4*>(from);
}
__device__ __forceinline__ uint32_t load_shared_4(SharedAddress from) {
    emulator::check_alignment(from, 4);
    return *reinterpret_cast<const uint32_t*>(from);
}

// 16 bytes to shared memory, in time.
__device__ __forceinline__ void copy_16(SharedAddress to, const void* from) {
    emulator::check_alignment(to, 16);
    emulator::check_alignment(from, 16);
    *reinterpret_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}
__device__ __forceinline__ void copy_4(SharedAddress to, const void* from) {
    emulator::check_alignment(to, 4);
    emulator::check_alignment(from, 4);
    *reinterpret_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
}
__device__ __forceinline__ void commit_copies() {}
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {}

#else

// c += a b.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and gets of matrix i the
// elements 2t, 2t+1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row));
}

// An 8 x 8 matrix of 16-bit elements, of which lane 4g + t has those of row g in columns 2t, 2t+1, and gets those of column g
// in rows 2t, 2t+1.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t pair) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

__device__ __forceinline__ uint4 load_shared_16(SharedAddress from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}
__device__ __forceinline__ uint32_t load_shared_4(SharedAddress from) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
    return v;
}

// 16 bytes to shared memory, in time, past the L1 cache.
__device__ __forceinline__ void copy_16(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// 4 bytes to shared memory, in time.
__device__ __forceinline__ void copy_4(SharedAddress to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last kLeft groups of this thread have arrived.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace moe
