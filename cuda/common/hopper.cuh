// What only compute capability 9.0 has: a copy engine, and products by a whole warpgroup (four
// warps, the first of them divisible by four) that run beside the threads. One name for an instruction, and what the emulated
// driver does instead. A kernel's body stands under `#ifdef MOE_HOPPER`; elsewhere it traps.
#pragma once

#include "common/barriers.cuh"

#if defined(CANDLE_MOE_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOE_HOPPER 1
#endif

namespace moe {

constexpr uint32_t kWarpgroup = 128;

// Operands of a warpgroup in shared memory: rows of 64 elements of 16 bits, whose pieces of 16 bytes are exchanged (the
// "128-byte swizzle"), from a multiple of kSwizzleAlignment bytes on.
constexpr uint32_t kSwizzledRowBytes = 128;
constexpr uint32_t kSwizzleAlignment = 1024;

// Where piece `piece` of row `row` is.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t piece) {
    return row * kSwizzledRowBytes + (piece ^ row % 8) * 16;
}

#if defined(CANDLE_MOE_EMULATOR)

// The dynamic shared memory of the block, whose size is a multiple of kSwizzleAlignment.
__device__ __forceinline__ SharedAddress aligned_shared() {
    unsigned char* const start = static_cast<unsigned char*>(emulator::dynamic_shared());
    emulator::check_alignment(start, kSwizzleAlignment);
    return start;
}
__device__ __forceinline__ void write_16(SharedAddress to, uint4 value) {
    emulator::check_alignment(to, 16);
    *reinterpret_cast<uint4*>(to) = value;
}

__device__ __forceinline__ void show_barriers() {}
// Bytes count with the arrival that expects them, so that copies need no arrival of their own.
__device__ __forceinline__ void arrive_expecting(SharedAddress barrier, uint32_t) { arrive(barrier); }
__device__ __forceinline__ void copy_by_engine(SharedAddress to, const void* from, uint32_t bytes, SharedAddress) {
    memcpy(to, from, bytes);
}
__device__ __forceinline__ void bring(
    SharedAddress to, const void* from, uint32_t bytes, SharedAddress to_too, const void* from_too, uint32_t bytes_too,
    SharedAddress barrier) {
    memcpy(to, from, bytes);
    if (bytes_too > 0) memcpy(to_too, from_too, bytes_too);
    arrive(barrier);
}
__device__ __forceinline__ void show_to_engine() {}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {}

__device__ __forceinline__ uint32_t uniform(uint32_t value) { return value; }
__device__ __forceinline__ void begin_multiplies() {}
__device__ __forceinline__ void end_multiplies() {}
template <int kLeft>
__device__ __forceinline__ void wait_for_multiplies() {}
template <int kNumber>
__device__ __forceinline__ void settle(float (&)[kNumber]) {}

// The A operands of the lanes of this warp.
using Operands = uint32_t[32][4];
__device__ __forceinline__ Operands& operands_of_warp(const uint32_t (&a)[4]) {
    __shared__ Operands all[32];
    Operands& warp = all[threadIdx.x / 32];
    for (int i = 0; i < 4; ++i) warp[threadIdx.x % 32][i] = a[i];
    __syncwarp();
    return warp;
}

// c += a b in time.
template <typename T, int kColumns, int kSums>
__device__ __forceinline__ void multiply(float (&c)[kSums], const uint32_t (&a)[4], SharedAddress b, uint32_t step) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Operands& warp = operands_of_warp(a);
    for (int i = 0; i < kColumns / 2; ++i) {
        const uint32_t row = g + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
        double sum = c[i];
        for (uint32_t k = 0; k < 16; ++k) {
            const uint32_t x = warp[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const uint32_t at = swizzled(column, step * 2 + k / 8) + k % 8 * 2;
            const uint32_t y = *reinterpret_cast<const uint16_t*>(b + at);
            sum += double(low_of<T>(x >> (16 * (k % 2)))) * low_of<T>(y);
        }
        c[i] = static_cast<float>(sum);
    }
    __syncwarp();
}

#elif defined(MOE_HOPPER)

// ------------------------------------------------------------------------------------------------------------------
// Shared memory

// The dynamic shared memory of the block, whose size is a multiple of kSwizzleAlignment.
__device__ __forceinline__ SharedAddress aligned_shared() {
    extern __shared__ __align__(1024) unsigned char moe_aligned_shared[];
    const SharedAddress start = shared_address(moe_aligned_shared);
    if (start % kSwizzleAlignment != 0) __trap();
    return __shfl_sync(0xffffffffu, start, 0);  // kept in a register by it, instead of made again at each use
}
__device__ __forceinline__ void write_16(SharedAddress to, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

// ------------------------------------------------------------------------------------------------------------------
// The copy engine

// Barriers that were started are known to the copy engine after this.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and keeps the phase open until `bytes` more have been copied by the engine for this barrier.
__device__ __forceinline__ void arrive_expecting(SharedAddress barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// What this thread has written, or has waited for, is seen by the copy engine; by whoever writes, and by who waited for that.
__device__ __forceinline__ void show_to_engine() { asm volatile("fence.proxy.async;" ::: "memory"); }

// `bytes`, `to` and `from` are multiples of 16.
__device__ __forceinline__ void copy_by_engine(SharedAddress to, const void* from, uint32_t bytes, SharedAddress barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Has the copy engine bring two pieces of memory, whose sizes and addresses are multiples of 16, and then end a phase of the
// barrier, of which this is the only arrival.
__device__ __forceinline__ void bring(
    SharedAddress to, const void* from, uint32_t bytes, SharedAddress to_too, const void* from_too, uint32_t bytes_too,
    SharedAddress barrier) {
    arrive_expecting(barrier, bytes + bytes_too);
    copy_by_engine(to, from, bytes, barrier);
    if (bytes_too > 0) copy_by_engine(to_too, from_too, bytes_too, barrier);
}

// ------------------------------------------------------------------------------------------------------------------
// Registers, which a warpgroup may pass on to others; kRegisters is a multiple of 8.

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ------------------------------------------------------------------------------------------------------------------
// Products of a warpgroup

// The descriptor of rows: address / 16 in bits 0 to 13 (of a block that is in no cluster), 1024 / 16 for 8 rows in bits 32 to
// 45, the swizzle in bits 62 and 63. Bits 16 to 29 do not count where a row is one swizzled line.
__device__ __forceinline__ uint64_t descriptor_of(SharedAddress rows, uint32_t step) {
    return uint64_t(1u << 30 | 1024 / 16) << 32 | ((rows >> 4) + step * (32 / 16));
}

// A number that all lanes of the warp have, so that the compiler knows: it makes descriptors of it without asking lane by lane.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

// Before the first product of a group: registers that the threads have written are seen by it.
__device__ __forceinline__ void begin_multiplies() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ __forceinline__ void end_multiplies() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last kLeft groups are done; before that nobody may touch their registers.
template <int kLeft>
__device__ __forceinline__ void wait_for_multiplies() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from reading sums before the wait that stands before this.
template <int kNumber>
__device__ __forceinline__ void settle(float (&c)[kNumber]) {
#pragma unroll
    for (int i = 0; i < kNumber; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

template <typename T, int kColumns>
struct Multiply;

// c += a b, when the group is done: a is the warpgroup's 64 x 16 weights in registers, warp w of it having rows 16 w ..
// 16 w + 16 as one A operand of m16n8k16; b is columns 16 step .. 16 step + 16 of kColumns rows in shared memory; the first
// kColumns / 2 of c are as many C operands of m16n8k16, of 8 columns each.
template <typename T, int kColumns, int kSums>
__device__ __forceinline__ void multiply(float (&c)[kSums], const uint32_t (&a)[4], SharedAddress b, uint32_t step) {
    static_assert(kColumns <= 2 * kSums, "a sum for each product");
    Multiply<T, kColumns>::add(c, a, b, step);
}

#define MOE_SUMS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOE_SUMS_1 MOE_SUMS_0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_SUMS_2 MOE_SUMS_1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MOE_SUMS_3 MOE_SUMS_2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_SUMS_4 MOE_SUMS_3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MOE_SUMS_5 MOE_SUMS_4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MOE_SUMS_6 MOE_SUMS_5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MOE_SUMS_7 MOE_SUMS_6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_SUMS_8 MOE_SUMS_7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MOE_SUMS_9 MOE_SUMS_8 ", %72, %73, %74, %75, %76, %77, %78, %79"

#define MOE_EIGHT(i)                                                                                                     \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define MOE_REGISTERS_0 MOE_EIGHT(0)
#define MOE_REGISTERS_1 MOE_REGISTERS_0, MOE_EIGHT(8)
#define MOE_REGISTERS_2 MOE_REGISTERS_1, MOE_EIGHT(16)
#define MOE_REGISTERS_3 MOE_REGISTERS_2, MOE_EIGHT(24)
#define MOE_REGISTERS_4 MOE_REGISTERS_3, MOE_EIGHT(32)
#define MOE_REGISTERS_5 MOE_REGISTERS_4, MOE_EIGHT(40)
#define MOE_REGISTERS_6 MOE_REGISTERS_5, MOE_EIGHT(48)
#define MOE_REGISTERS_7 MOE_REGISTERS_6, MOE_EIGHT(56)
#define MOE_REGISTERS_8 MOE_REGISTERS_7, MOE_EIGHT(64)
#define MOE_REGISTERS_9 MOE_REGISTERS_8, MOE_EIGHT(72)

// The operands behind the sums: weights, descriptor, and 1 for "add to the sums".
#define MOE_MULTIPLY(T, NAME, COLUMNS, LAST, A0, A1, A2, A3, B, ADD)                                                     \
    template <>                                                                                                          \
    struct Multiply<T, COLUMNS> {                                                                                        \
        static __device__ __forceinline__ void add(float* c, const uint32_t (&a)[4], SharedAddress b, uint32_t step) {   \
        asm volatile(                                                                                                    \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                                                       \
            "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" MOE_SUMS_##LAST "}, "             \
            "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 0;\n}"                                        \
            : MOE_REGISTERS_##LAST                                                                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_of(b, step)), "r"(1));                         \
        }                                                                                                                \
    };
#define MOE_MULTIPLIES(T, NAME)                             \
    MOE_MULTIPLY(T, NAME, 16, 0, 8, 9, 10, 11, 12, 13)      \
    MOE_MULTIPLY(T, NAME, 32, 1, 16, 17, 18, 19, 20, 21)    \
    MOE_MULTIPLY(T, NAME, 48, 2, 24, 25, 26, 27, 28, 29)    \
    MOE_MULTIPLY(T, NAME, 64, 3, 32, 33, 34, 35, 36, 37)    \
    MOE_MULTIPLY(T, NAME, 80, 4, 40, 41, 42, 43, 44, 45)    \
    MOE_MULTIPLY(T, NAME, 96, 5, 48, 49, 50, 51, 52, 53)    \
    MOE_MULTIPLY(T, NAME, 112, 6, 56, 57, 58, 59, 60, 61)   \
    MOE_MULTIPLY(T, NAME, 128, 7, 64, 65, 66, 67, 68, 69)   \
    MOE_MULTIPLY(T, NAME, 144, 8, 72, 73, 74, 75, 76, 77)   \
    MOE_MULTIPLY(T, NAME, 160, 9, 80, 81, 82, 83, 84, 85)

MOE_MULTIPLIES(__nv_bfloat16, "bf16")
MOE_MULTIPLIES(__half, "f16")

#endif

}  // namespace moe
