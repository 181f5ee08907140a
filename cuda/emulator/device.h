// The CUDA C++ that kernels see when g++ compiles them for the emulated driver (scripts/cuda-emulator): included before the
// first line of every .cu file. translate.py rewrites what a header cannot: __global__, __shared__, __launch_bounds__.
//
// Instructions that CUDA C++ has no name for are written in the kernels as inline PTX; beside it, under
// `#ifdef CANDLE_MOE_EMULATOR`, stand calls of `namespace emulator` below.
//
// Limits: memory is sequentially consistent, so a missing fence does no harm here; threads are interleaved only where they
// wait for each other, sleep, or (seeded) at atomics; textures and cooperative groups are not here, and of tensor cores and
// asynchronous copies what cuda/common has. __activemask gives the calling lane alone, as a device may. Approximate functions
// (__expf, rsqrtf) are more exact than on a device.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

// ------------------------------------------------------------------------------------------------------------------
// The machine

namespace emulator {

struct Position {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
    unsigned lane;
};

// The position of the running thread.
extern __thread const Position* here __attribute__((tls_model("initial-exec")));

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Operation : uint8_t {
    kSync, kBallot, kAny, kAll, kShuffle, kMatchAny, kMatchAll,
    kAddUnsigned, kMinUnsigned, kMaxUnsigned, kMinSigned, kMaxSigned, kAnd, kOr, kXor,
};

// Waits for all lanes of `mask`; gives what the operation makes of their values.
uint64_t collective(Operation operation, unsigned mask, uint64_t value, unsigned argument = 0);
// Lanes of this warp that run.
unsigned active_lanes();

struct BarrierResult {
    unsigned ones;      // threads whose predicate held
    unsigned arrived;
};
// Barrier `id` of the block, for `threads` threads; 0 means all that have not exited.
BarrierResult barrier(unsigned id = 0, unsigned threads = 0, bool predicate = false);
// Counts for a barrier without waiting for it.
void barrier_arrive(unsigned id, unsigned threads);

void cluster_arrive();
void cluster_wait();
inline void cluster_sync() { cluster_arrive(); cluster_wait(); }
unsigned cluster_rank();
unsigned cluster_size();
// The same place in the shared memory of block `rank` of this cluster.
void* cluster_address(const void* my_shared_address, unsigned rank);
template <typename T> T* cluster_address(T* mine, unsigned rank) {
    return static_cast<T*>(cluster_address(static_cast<const void*>(mine), rank));
}

// Lets other threads run; called in loops that wait for another thread's write.
void yield();
// The same where a thread of another device writes.
void yield_to_other_devices();
// The same now and then: every atomic operation may be part of such a loop.
void pass_atomic();
void check_alignment(const void* address, size_t alignment);

// Shared memory of the running block.
void* dynamic_shared();
unsigned new_static_shared();
void* static_shared(unsigned variable, size_t size, size_t alignment);
template <typename T> T& static_shared() {
    static const unsigned variable = new_static_shared();
    return *static_cast<T*>(static_shared(variable, sizeof(T), alignof(T)));
}

// ------------------------------------------------------------------------------------------------------------------
// Registration of kernels: translate.py adds a Registration behind each

constexpr unsigned kMaxParameters = 32;

struct Kernel {
    const char* name;
    const char* file;
    void (*run)(void** arguments);
    unsigned max_threads;  // 0: not said
    unsigned num_parameters;
    uint32_t sizes[kMaxParameters];
    const Kernel* next;
};

void add_kernel(Kernel* kernel);

template <typename Signature, Signature kKernel> struct Caller;
template <typename... P, void (*kKernel)(P...)> struct Caller<void (*)(P...), kKernel> {
    template <size_t... I> static void call(void** arguments, std::index_sequence<I...>) {
        kKernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
    }
    static void run(void** arguments) { call(arguments, std::index_sequence_for<P...>{}); }
    static Kernel describe(const char* name, const char* file, unsigned max_threads) {
        static_assert(sizeof...(P) <= kMaxParameters, "too many parameters");
        return {name, file, run, max_threads, sizeof...(P), {static_cast<uint32_t>(sizeof(P))...}, nullptr};
    }
};

constexpr unsigned first_of(unsigned first, unsigned = 0, unsigned = 0) { return first; }

struct Registration {
    Kernel kernel;
    explicit Registration(const Kernel& described) : kernel(described) { add_kernel(&kernel); }
};

template <typename T> inline uint64_t to_word(const T& value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a lane gives 8 bytes at most");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    return word;
}

template <typename T> inline T from_word(uint64_t word) {
    T value;
    memcpy(static_cast<void*>(&value), &word, sizeof(T));
    return value;
}

// T, where a template is not to deduce it.
template <typename T> struct SameType { using type = T; };
template <typename T> using Same = typename SameType<T>::type;

template <typename To, typename From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
}

}  // namespace emulator

// ------------------------------------------------------------------------------------------------------------------
// Keywords

#undef __global__
#undef __shared__
#undef __launch_bounds__
#undef __cluster_dims__
#undef __maxnreg__
#undef __grid_constant__
#undef __device__
#undef __host__
#undef __constant__
#define __global__ EMULATOR_GLOBAL
#define __shared__ EMULATOR_SHARED
#define __launch_bounds__(...) EMULATOR_BOUNDS(__VA_ARGS__)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __device__
#define __host__
#define __constant__

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __CUDA_ARCH__ 900

#define threadIdx (::emulator::here->thread)
#define blockIdx (::emulator::here->block)
#define blockDim (::emulator::here->block_dim)
#define gridDim (::emulator::here->grid_dim)
constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------------------------
// Warps and blocks

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_count(int p) { return static_cast<int>(emulator::barrier(0, 0, p != 0).ones); }
inline int __syncthreads_or(int p) { return emulator::barrier(0, 0, p != 0).ones != 0; }
inline int __syncthreads_and(int p) {
    const auto result = emulator::barrier(0, 0, p != 0);
    return result.ones == result.arrived;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::collective(emulator::Operation::kSync, mask, 0); }
inline unsigned __activemask() { return emulator::active_lanes(); }

inline unsigned __ballot_sync(unsigned mask, int p) {
    return static_cast<unsigned>(emulator::collective(emulator::Operation::kBallot, mask, p != 0));
}
inline int __any_sync(unsigned mask, int p) {
    return static_cast<int>(emulator::collective(emulator::Operation::kAny, mask, p != 0));
}
inline int __all_sync(unsigned mask, int p) {
    return static_cast<int>(emulator::collective(emulator::Operation::kAll, mask, p != 0));
}

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned lane = emulator::here->lane;
    const unsigned from = (lane & ~(width - 1u)) | (static_cast<unsigned>(source) & (width - 1u));
    return emulator::from_word<T>(
        emulator::collective(emulator::Operation::kShuffle, mask, emulator::to_word(value), from));
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulator::here->lane;
    const unsigned from = (lane & (width - 1u)) >= delta ? lane - delta : lane;
    return emulator::from_word<T>(
        emulator::collective(emulator::Operation::kShuffle, mask, emulator::to_word(value), from));
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulator::here->lane;
    const unsigned from = (lane & (width - 1u)) + delta < static_cast<unsigned>(width) ? lane + delta : lane;
    return emulator::from_word<T>(
        emulator::collective(emulator::Operation::kShuffle, mask, emulator::to_word(value), from));
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    const unsigned lane = emulator::here->lane;
    const unsigned other = lane ^ static_cast<unsigned>(lanes);
    const unsigned from = other <= (lane | (width - 1u)) ? other : lane;
    return emulator::from_word<T>(
        emulator::collective(emulator::Operation::kShuffle, mask, emulator::to_word(value), from));
}

template <typename T> unsigned __match_any_sync(unsigned mask, T value) {
    return static_cast<unsigned>(
        emulator::collective(emulator::Operation::kMatchAny, mask, emulator::to_word(value)));
}
template <typename T> unsigned __match_all_sync(unsigned mask, T value, int* all) {
    const auto lanes = emulator::collective(emulator::Operation::kMatchAll, mask, emulator::to_word(value));
    *all = lanes != 0;
    return static_cast<unsigned>(lanes);
}

#define EMULATOR_REDUCE(NAME, T, OPERATION)                                                                     \
    inline T NAME(unsigned mask, T value) {                                                                     \
        return static_cast<T>(emulator::collective(emulator::Operation::OPERATION, mask, static_cast<uint32_t>(value))); \
    }
EMULATOR_REDUCE(__reduce_add_sync, unsigned, kAddUnsigned)
EMULATOR_REDUCE(__reduce_add_sync, int, kAddUnsigned)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, kMinUnsigned)
EMULATOR_REDUCE(__reduce_min_sync, int, kMinSigned)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, kMaxUnsigned)
EMULATOR_REDUCE(__reduce_max_sync, int, kMaxSigned)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, kAnd)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, kOr)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef EMULATOR_REDUCE

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { emulator::yield(); }
[[noreturn]] inline void __trap() { emulator::fail("the kernel called __trap"); }
inline long long clock64() { return static_cast<long long>(__builtin_ia32_rdtsc()); }

// ------------------------------------------------------------------------------------------------------------------
// Memory

#define EMULATOR_LOAD(NAME)                                     \
    template <typename T> inline T NAME(const T* from) {        \
        ::emulator::check_alignment(from, alignof(T));          \
        return *from;                                           \
    }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcv)
EMULATOR_LOAD(__ldlu)
#undef EMULATOR_LOAD

#define EMULATOR_STORE(NAME)                                                                \
    template <typename T> inline void NAME(T* to, const ::emulator::Same<T>& value) {   \
        ::emulator::check_alignment(to, alignof(T));                                        \
        *to = value;                                                                        \
    }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

namespace emulator {

// Any atomic update of 1, 2, 4 or 8 bytes; gives the old value.
template <typename T, typename Update> inline T update(T* address, Update&& make) {
    using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    static_assert(sizeof(T) == sizeof(Word));
    check_alignment(address, sizeof(T));
    pass_atomic();
    Word* word = reinterpret_cast<Word*>(address);
    Word old = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(
        word, &old, bits_as<Word>(static_cast<T>(make(bits_as<T>(old)))), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return bits_as<T>(old);
}

}  // namespace emulator

#define EMULATOR_ATOMIC(NAME, NEW)                                                                  \
    template <typename T> inline T NAME(T* address, ::emulator::Same<T> value) {                \
        return ::emulator::update(address, [&](T old) { return NEW; });                             \
    }                                                                                               \
    template <typename T> inline T NAME##_block(T* address, ::emulator::Same<T> value) {        \
        return NAME(address, value);                                                                \
    }                                                                                               \
    template <typename T> inline T NAME##_system(T* address, ::emulator::Same<T> value) {       \
        return NAME(address, value);                                                                \
    }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, ((void)old, value))
EMULATOR_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
EMULATOR_ATOMIC(atomicDec, old == 0 || old > value ? value : T(old - 1))
#undef EMULATOR_ATOMIC

template <typename T>
inline T atomicCAS(T* address, ::emulator::Same<T> expected, ::emulator::Same<T> value) {
    return emulator::update(address, [&](T old) { return old == expected ? value : old; });
}

// ------------------------------------------------------------------------------------------------------------------
// Numbers

inline unsigned __float_as_uint(float v) { return emulator::bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return emulator::bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return emulator::bits_as<float>(v); }
inline float __int_as_float(int v) { return emulator::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return emulator::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return emulator::bits_as<double>(v); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline unsigned long long __brevll(unsigned long long v) {
    unsigned long long reversed = 0;
    for (int i = 0; i < 64; ++i) reversed |= (v >> i & 1) << (63 - i);
    return reversed;
}
inline unsigned __brev(unsigned v) { return static_cast<unsigned>(__brevll(v) >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> (4 * i) & 0xf;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xff;
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
// Of a number and a NaN the number, whatever NaN it is; the C library's gives NaN for one that signals.
inline float emulated_fmaxf(float a, float b) { return a != a ? b : b != b ? a : a > b || (a == b && std::signbit(b)) ? a : b; }
inline float emulated_fminf(float a, float b) { return -emulated_fmaxf(-a, -b); }
#define fmaxf emulated_fmaxf
#define fminf emulated_fminf
inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }
inline unsigned __usad(unsigned a, unsigned b, unsigned c) { return (a < b ? b - a : a - b) + c; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float v) { return sinf(v); }
inline float __cosf(float v) { return cosf(v); }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
inline float normcdff(float v) { return 0.5f * erfcf(-v * 0.70710678f); }
inline double normcdf(double v) { return 0.5 * erfc(-v * 0.70710678118654752440); }
inline int __float2int_rn(float v) { return static_cast<int>(lrintf(v)); }
inline int __float2int_rz(float v) { return static_cast<int>(v); }
inline unsigned __float2uint_rn(float v) { return static_cast<unsigned>(llrintf(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }

// Of numbers of the same kind, with CUDA's conversions; of floats, what is no NaN.
template <typename A, typename B> inline auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    const T x = static_cast<T>(a), y = static_cast<T>(b);
    if constexpr (std::is_floating_point_v<T>) return std::fmax(x, y);
    else return x < y ? y : x;
}
template <typename A, typename B> inline auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    const T x = static_cast<T>(a), y = static_cast<T>(b);
    if constexpr (std::is_floating_point_v<T>) return std::fmin(x, y);
    else return y < x ? y : x;
}

// What the CUDA headers have for devices alone.
#define EMULATOR_NARROW(NAME, FUNCTION)                                                                        \
    inline __half NAME(__half v) { return __float2half_rn(FUNCTION(__half2float(v))); }                        \
    inline __nv_bfloat16 NAME(__nv_bfloat16 v) { return __float2bfloat16_rn(FUNCTION(__bfloat162float(v))); }
EMULATOR_NARROW(hexp, expf)
EMULATOR_NARROW(hlog, logf)
EMULATOR_NARROW(hsqrt, sqrtf)
EMULATOR_NARROW(hrsqrt, rsqrtf)
EMULATOR_NARROW(hsin, sinf)
EMULATOR_NARROW(hcos, cosf)
EMULATOR_NARROW(htanh, tanhf)
EMULATOR_NARROW(hfloor, floorf)
EMULATOR_NARROW(hceil, ceilf)
#undef EMULATOR_NARROW
