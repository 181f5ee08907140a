// Runs kernels on the CPU: every thread of a block is a fiber, which runs until it meets a warp collective or a barrier and
// then hands over to the next fiber that can run. The blocks of a cluster run together, other blocks one after another on
// each CPU.
//
// CANDLE_MOE_EMULATOR_SEED=n, n > 0: shuffles the order of blocks and the order in which fibers go on (at random, warp after
// warp as far as each can, or all warps in turn), and interrupts threads at atomics, so that a missing barrier shows as a
// wrong result.
// CANDLE_MOE_EMULATOR_RESIDENT=n: n clusters (or blocks) run side by side, thread by thread, instead of one.
// CANDLE_MOE_EMULATOR_WORKERS=n: threads that share the blocks of a large launch; else one per CPU. 1 makes every run the
// same.
//
// What no device promises to survive ends the program with a message that names the kernel, block and thread: lanes that
// wait for a lane that has exited, or in different collectives for each other; a deadlock; a wait without end; a shuffle
// from a lane that takes no part; an access outside of device memory or of the block's shared memory.
//
// Limits: x86-64 only. A thread is interrupted nowhere else, so that races between plain reads and writes show only where
// the order of whole stretches matters. A loop that waits for another thread's plain write without __nanosleep, an atomic
// or emulator::yield() never ends. Divergent __syncthreads are counted by thread, and not reported.

#include "emulator.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// Saves the running fiber's registers on its stack and its stack pointer in *from; goes on with the fiber `to`. When this
// fiber goes on, gives what *result is by then. It comes back by a jump, since the processor's prediction of returns would
// be that of another fiber; called at the very end of a function, it saves a wrong prediction there too.
extern "C" uint64_t emulator_switch(void** from, void* to, const uint64_t* result);
asm(R"(
.text
.p2align 4
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq %rdx
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %rdx
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    movq (%rdx), %rax
    popq %rcx
    jmp *%rcx
.size emulator_switch, . - emulator_switch
)");

namespace emulator {

__thread const Position* here = nullptr;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr size_t kGuardedStacks = 1 << 14;
constexpr size_t kPage = 4096;
constexpr unsigned kNamedBarriers = 16;
constexpr uint64_t kYieldsPerLook = 1'000'000;
constexpr double kEndlessSeconds = 20;
constexpr uint64_t kThreadsWorthWaking = 4096;
constexpr unsigned kAtomicsPerYield = 1024;
constexpr unsigned char kPoison = 0xCB;

// ------------------------------------------------------------------------------------------------------------------
// State

enum class State : uint8_t { kReady, kCollective, kBarrier, kCluster, kExited };

struct Block;
struct Warp;

struct Thread {
    Position position;
    void* stack_pointer;
    Block* block;
    Warp* warp;
    State state;
    uint64_t barrier_result;  // a BarrierResult
    unsigned cluster_phase;
};

struct Warp {
    Thread* threads;
    unsigned live;     // lanes that have not exited
    unsigned waiting;  // lanes in a collective
    unsigned ready;    // lanes that can go on
    bool queued;
    // What lanes brought to their last collective, and what it gave.
    Operation operations[32];
    unsigned masks[32], arguments[32];
    uint64_t values[32], results[32];
};

struct Barrier {
    std::vector<Thread*> waiting;
    unsigned arrived = 0;  // without waiting
    unsigned ones = 0;
    unsigned threads = 0;
};

struct Cluster {
    unsigned live, arrived, phase;
    unsigned size;
    size_t first_block;
    std::vector<Thread*> waiting;
};

struct Block {
    Cluster* cluster = nullptr;
    unsigned rank = 0;  // in the cluster
    unsigned live = 0;
    char* shared = nullptr;  // static from here on, dynamic up to the guard page
    bool closed = false;     // nobody may touch `shared`
    Thread* threads = nullptr;
    Barrier barriers[kNamedBarriers];
};

// Shared memory of a block: [static | ... | dynamic][guard page].
constexpr size_t kSharedPages = (kMaxStaticShared + kMaxShared + kPage) / kPage * kPage;

uint64_t next_random(uint64_t& state) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Which thread goes on: one of the warp that was queued last, by lane; one of each warp in turn; any.
enum class Policy { kDeep, kWide, kRandom };

Thread* take(Warp& warp, unsigned lane) {
    warp.ready &= ~(1u << lane);
    return &warp.threads[lane];
}

// The warps that have a lane that can go on.
class ReadyQueue {
public:
    void reset(size_t capacity, Policy policy) {
        size_t power = 1;
        while (power < capacity) power *= 2;
        ring_.resize(power);
        first_ = count_ = 0;
        policy_ = policy;
    }
    bool empty() const { return count_ == 0; }
    bool is_deep() const { return policy_ == Policy::kDeep; }
    void push(Warp& warp) {
        if (warp.queued) return;
        warp.queued = true;
        at(count_++) = &warp;
    }
    // Null where the warp that was looked at has no such lane any more.
    Thread* pop(uint64_t& random);

private:
    Warp*& at(size_t i) { return ring_[(first_ + i) & (ring_.size() - 1)]; }
    // Of the first warp where the policy is wide, else of the last.
    void drop(Warp& warp) {
        if (policy_ == Policy::kWide) ++first_;
        --count_;
        warp.queued = false;
    }

    std::vector<Warp*> ring_;
    size_t first_ = 0, count_ = 0;
    Policy policy_ = Policy::kDeep;
};

Thread* ReadyQueue::pop(uint64_t& random) {
    if (policy_ == Policy::kRandom) std::swap(at(count_ - 1), at(next_random(random) % count_));
    Warp& warp = policy_ == Policy::kWide ? *at(0) : *at(count_ - 1);
    unsigned lanes = warp.ready;
    if (lanes == 0) return drop(warp), nullptr;
    if (policy_ == Policy::kRandom) {
        for (auto skip = next_random(random) % __builtin_popcount(lanes); skip > 0; --skip) lanes &= lanes - 1;
    }
    Thread* thread = take(warp, static_cast<unsigned>(__builtin_ctz(lanes)));
    if (policy_ == Policy::kWide || warp.ready == 0) drop(warp);
    if (warp.ready != 0) push(warp);
    return thread;
}

struct Machine {
    const Launch* launch = nullptr;
    Thread* current = nullptr;
    void* scheduler = nullptr;  // its stack pointer
    ReadyQueue ready;
    std::vector<Thread*> yielded;
    uint64_t yields = 0;  // since something else happened
    std::chrono::steady_clock::time_point waiting_since;
    unsigned atomics = 0;
    unsigned live = 0;
    uint64_t random = 0;
    bool shuffled = false;
    size_t dynamic_bytes = 0;  // rounded up

    std::unique_ptr<Thread[]> threads;
    std::unique_ptr<Warp[]> warps;
    std::deque<Block> blocks;  // which keep their shared memory from launch to launch
    std::unique_ptr<Cluster[]> clusters;
    size_t num_threads = 0, num_warps = 0, num_clusters = 0;
    std::vector<char*> stacks;  // lowest address above the guard page

    // Static shared variables of the running group: offsets by number.
    std::vector<size_t> offsets;
    size_t static_bytes = 0;
};

__thread Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;

unsigned volume(dim3 d) { return d.x * d.y * d.z; }

uint3 unravel(unsigned i, dim3 size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

__attribute__((noinline)) const char* name_of(Operation operation) {
    static const char* const names[] = {
        "__syncwarp", "__ballot_sync", "__any_sync", "__all_sync", "__shfl_sync", "__match_any_sync", "__match_all_sync",
        "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_min_sync (int)",
        "__reduce_max_sync (int)", "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync"};
    return names[static_cast<unsigned>(operation)];
}

// ------------------------------------------------------------------------------------------------------------------
// Fibers

void make_ready(Thread& thread) {
    thread.warp->ready |= 1u << thread.position.lane;
    machine->ready.push(*thread.warp);
}

// The next thread to run; null where none can.
__attribute__((noinline)) Thread* pick() {
    Machine& m = *machine;
    for (;;) {
        if (m.ready.empty()) {
            for (Thread* thread : m.yielded) make_ready(*thread);
            m.yielded.clear();
            if (m.ready.empty()) return nullptr;
        }
        if (Thread* thread = m.ready.pop(m.random)) return thread;
    }
}

// The stack pointer of the fiber that goes on now in place of `self`: the scheduler's, where none can.
void* choose_next(Thread& self) {
    Machine& m = *machine;
    Warp& warp = *self.warp;
    const bool stay = warp.ready != 0 && m.ready.is_deep();
    Thread* next = stay ? take(warp, static_cast<unsigned>(__builtin_ctz(warp.ready))) : pick();
    if (next == nullptr) return m.scheduler;
    m.current = next;
    here = &next->position;
    return next->stack_pointer;
}

// Hands over; comes back when somebody has made this thread ready, with what *result is by then.
inline uint64_t suspend(Thread& self, const uint64_t* result) {
    void* next = choose_next(self);
    if (machine->current == &self && next != machine->scheduler) return *result;
    return emulator_switch(&self.stack_pointer, next, result);
}

constexpr uint64_t kNothing = 0;

void exit_thread();

void fiber_main() {
    machine->launch->kernel->run(machine->launch->arguments);
    exit_thread();
    suspend(*machine->current, &kNothing);
    fail("an exited thread went on");
}

char* new_stack() {
    static std::atomic<size_t> number{0};
    void* pages = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // A process can have so many mappings only; those without a guard page count as one.
    const bool guarded = number++ < kGuardedStacks;
    if (pages == MAP_FAILED || (guarded && mprotect(pages, kPage, PROT_NONE) != 0)) fail("no memory for the stacks of threads");
    return static_cast<char*>(pages) + kPage;
}

char* new_region() {
    void* pages =
        mmap(nullptr, kSharedPages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) fail("no memory for shared memory");
    if (mprotect(static_cast<char*>(pages) + kSharedPages, kPage, PROT_NONE) != 0) fail("shared memory has no guard page");
    return static_cast<char*>(pages);
}

// The stack pointer of a fiber that will start with fiber_main.
void* fresh_stack_pointer(size_t number) {
    Machine& m = *machine;
    while (m.stacks.size() <= number) m.stacks.push_back(new_stack());
    // Different tops, so that fibers do not share the same lines of the cache.
    char* top = m.stacks[number] + kStack - 64 * (number % 61);
    const void** frame = reinterpret_cast<const void**>(top) - 9;
    std::fill(frame, frame + 9, nullptr);
    frame[0] = &kNothing;
    frame[7] = reinterpret_cast<const void*>(fiber_main);
    return frame;
}

// ------------------------------------------------------------------------------------------------------------------
// Collectives

uint64_t fold(Operation operation, uint64_t a, uint64_t b) {
    const auto x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
    const auto signed_x = static_cast<int32_t>(x), signed_y = static_cast<int32_t>(y);
    switch (operation) {
        case Operation::kAddUnsigned: return static_cast<uint32_t>(x + y);
        case Operation::kMinUnsigned: return std::min(x, y);
        case Operation::kMaxUnsigned: return std::max(x, y);
        case Operation::kMinSigned: return signed_x < signed_y ? x : y;
        case Operation::kMaxSigned: return signed_x < signed_y ? y : x;
        case Operation::kAnd: return x & y;
        case Operation::kOr: return x | y;
        case Operation::kXor: return x ^ y;
        default: fail("%s is no reduction", name_of(operation));
    }
}

template <typename Visit> void for_lanes(unsigned mask, Visit&& visit) {
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) visit(static_cast<unsigned>(__builtin_ctz(rest)));
}

unsigned lanes_of_value(const Warp& warp, unsigned mask, uint64_t value) {
    unsigned lanes = 0;
    for_lanes(mask, [&](unsigned lane) { lanes |= unsigned(warp.values[lane] == value) << lane; });
    return lanes;
}

uint64_t common_result(const Warp& warp, Operation operation, unsigned mask) {
    const uint64_t first = warp.values[__builtin_ctz(mask)];
    switch (operation) {
        case Operation::kSync: return 0;
        case Operation::kBallot: return lanes_of_value(warp, mask, 1);
        case Operation::kAny: return lanes_of_value(warp, mask, 1) != 0;
        case Operation::kAll: return lanes_of_value(warp, mask, 1) == mask;
        case Operation::kMatchAll: return lanes_of_value(warp, mask, first) == mask ? mask : 0;
        default: break;
    }
    uint64_t result = first;
    for_lanes(mask & (mask - 1), [&](unsigned lane) { result = fold(operation, result, warp.values[lane]); });
    return result;
}

void compute_results(Warp& warp, Operation operation, unsigned mask) {
    if (operation == Operation::kShuffle) {
        for_lanes(mask, [&](unsigned lane) {
            const unsigned from = warp.arguments[lane];
            if (!(mask >> from & 1)) fail("lane %u shuffles from lane %u, which is not in mask %08x", lane, from, mask);
            warp.results[lane] = warp.values[from];
        });
    } else if (operation == Operation::kMatchAny) {
        for_lanes(mask, [&](unsigned lane) { warp.results[lane] = lanes_of_value(warp, mask, warp.values[lane]); });
    } else {
        const uint64_t result = common_result(warp, operation, mask);
        for_lanes(mask, [&](unsigned lane) { warp.results[lane] = result; });
    }
}

// Whether all lanes of the lane's mask wait in the same collective. Lanes that can never meet end the program.
bool all_arrived(const Warp& warp, unsigned me) {
    const unsigned mask = warp.masks[me];
    const Operation operation = warp.operations[me];
    bool same = true;
    for_lanes(mask, [&](unsigned lane) {
        if (warp.masks[lane] == mask && warp.operations[lane] == operation) return;
        if (warp.masks[lane] >> me & 1) {
            fail("%s with mask %08x meets lane %u in %s with mask %08x", name_of(operation), mask, lane,
                 name_of(warp.operations[lane]), warp.masks[lane]);
        }
        same = false;
    });
    return same;
}

// All lanes of the mask but this one, which runs, can go on.
void release_warp(Warp& warp, unsigned mask, unsigned me) {
    warp.waiting &= ~mask;
    const unsigned others = mask & ~(1u << me);
    if (others == 0) return;
    warp.ready |= others;
    machine->ready.push(warp);
}

// Called by the last lane that the mask may have waited for.
__attribute__((noinline)) bool finish_collective(Warp& warp, unsigned me) {
    if (!all_arrived(warp, me)) return false;
    const unsigned mask = warp.masks[me];
    compute_results(warp, warp.operations[me], mask);
    release_warp(warp, mask, me);
    return true;
}

[[noreturn]] __attribute__((noinline)) void refuse_mask(const Warp& warp, unsigned me) {
    const char* name = name_of(warp.operations[me]);
    const unsigned mask = warp.masks[me];
    if (!(mask >> me & 1)) fail("%s with mask %08x, which lacks the lane", name, mask);
    fail("%s with mask %08x, but only %08x have not exited", name, mask, warp.live);
}

inline uint64_t wait_in(Thread& me, State state, const uint64_t* result) {
    me.state = state;
    machine->yields = 0;
    return suspend(me, result);
}

// ------------------------------------------------------------------------------------------------------------------
// Barriers

void release_barrier(Barrier& barrier) {
    const BarrierResult result{barrier.ones, static_cast<unsigned>(barrier.waiting.size()) + barrier.arrived};
    for (Thread* thread : barrier.waiting) {
        thread->barrier_result = bits_as<uint64_t>(result);
        if (thread != machine->current) make_ready(*thread);
    }
    barrier.waiting.clear();
    barrier.arrived = barrier.ones = barrier.threads = 0;
}

bool is_full(const Block& block, const Barrier& barrier) {
    const unsigned needed = barrier.threads == 0 ? block.live : barrier.threads;
    const size_t there = barrier.waiting.size() + barrier.arrived;
    return there > 0 && there >= needed;
}

void release_cluster(Cluster& cluster) {
    cluster.arrived = 0;
    ++cluster.phase;
    for (Thread* thread : cluster.waiting) make_ready(*thread);
    cluster.waiting.clear();
}

// Of a cluster, nobody may touch the shared memory of a block that has exited.
void close_shared(Block& block, bool closed) {
    if (block.closed == closed || (closed && block.cluster->size == 1)) return;
    if (mprotect(block.shared, kSharedPages, closed ? PROT_NONE : PROT_READ | PROT_WRITE) != 0) fail("mprotect failed");
    block.closed = closed;
}

void exit_thread() {
    Machine& m = *machine;
    Thread& me = *m.current;
    Warp& warp = *me.warp;
    Block& block = *me.block;
    Cluster& cluster = *block.cluster;
    me.state = State::kExited;
    m.yields = 0;
    --m.live;
    warp.live &= ~(1u << me.position.lane);
    for_lanes(warp.waiting, [&](unsigned lane) {
        if (warp.masks[lane] >> me.position.lane & 1) {
            fail("the thread exits while lane %u waits for it in %s", lane, name_of(warp.operations[lane]));
        }
    });
    --cluster.live;
    if (cluster.live > 0 && cluster.arrived == cluster.live) release_cluster(cluster);
    if (--block.live == 0) return close_shared(block, true);
    for (Barrier& barrier : block.barriers) {
        if (barrier.threads == 0 && is_full(block, barrier)) release_barrier(barrier);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Groups of blocks

void describe_wait(const Thread& thread, char* text, size_t size) {
    switch (thread.state) {
        case State::kCollective: {
            const unsigned lane = thread.position.lane;
            snprintf(text, size, "%s with mask %08x", name_of(thread.warp->operations[lane]), thread.warp->masks[lane]);
            return;
        }
        case State::kBarrier: snprintf(text, size, "a barrier of its block"); return;
        case State::kCluster: snprintf(text, size, "the barrier of its cluster"); return;
        default: snprintf(text, size, "nothing"); return;
    }
}

[[noreturn]] void report_deadlock() {
    Machine& m = *machine;
    std::string seen;
    for (size_t i = 0; i < m.num_threads; ++i) {
        const Thread& thread = m.threads[i];
        char wait[128];
        describe_wait(thread, wait, sizeof wait);
        const bool said = seen.find(wait) != std::string::npos;
        if (thread.state == State::kExited || said) continue;
        seen += wait;
        const Position& p = thread.position;
        fprintf(stderr, "cuda emulator: thread (%u, %u, %u) of block (%u, %u, %u) waits in %s\n", p.thread.x, p.thread.y,
                p.thread.z, p.block.x, p.block.y, p.block.z, wait);
    }
    here = nullptr;
    fail("deadlock in kernel %s: none of %u threads can go on", m.launch->kernel->name, m.live);
}

void set_up_thread(Block& block, uint3 block_index, unsigned number, size_t global_number) {
    Machine& m = *machine;
    Thread& thread = block.threads[number];
    thread = Thread{};
    thread.position.thread = unravel(number, m.launch->block);
    thread.position.block = block_index;
    thread.position.block_dim = m.launch->block;
    thread.position.grid_dim = m.launch->grid;
    thread.position.lane = number % 32;
    thread.block = &block;
    thread.warp = &m.warps[(global_number - number % 32) / 32];
    thread.stack_pointer = fresh_stack_pointer(global_number);
    make_ready(thread);
}

void set_up_warp(Warp& warp, Thread* threads, unsigned lanes) {
    warp.threads = threads;
    warp.live = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.waiting = warp.ready = 0;
    warp.queued = false;
}

void set_up_block(size_t slot, Cluster& cluster, unsigned rank, uint3 index) {
    Machine& m = *machine;
    const unsigned threads = volume(m.launch->block);
    const unsigned padded = (threads + 31) / 32 * 32;
    Block& block = m.blocks[slot];
    block.cluster = &cluster;
    block.rank = rank;
    block.live = threads;
    block.threads = &m.threads[slot * padded];
    if (block.shared == nullptr) block.shared = new_region();
    close_shared(block, false);
    memset(block.shared + kSharedPages - m.dynamic_bytes, kPoison, m.dynamic_bytes);
    for (unsigned warp = 0; warp < padded / 32; ++warp) {
        const unsigned lanes = std::min(32u, threads - warp * 32);
        set_up_warp(m.warps[slot * padded / 32 + warp], &block.threads[warp * 32], lanes);
    }
    for (unsigned i = 0; i < threads; ++i) set_up_thread(block, index, i, slot * padded + i);
    for (unsigned i = threads; i < padded; ++i) block.threads[i].state = State::kExited;
}

void set_up_cluster(size_t slot, uint64_t number) {
    Machine& m = *machine;
    const dim3 size = m.launch->cluster, grid = m.launch->grid;
    const uint3 place = unravel(number, dim3(grid.x / size.x, grid.y / size.y, grid.z / size.z));
    Cluster& cluster = m.clusters[slot];
    const unsigned blocks = volume(size);
    cluster.live = blocks * volume(m.launch->block);
    cluster.arrived = cluster.phase = 0;
    cluster.size = blocks;
    cluster.first_block = slot * blocks;
    for (unsigned rank = 0; rank < blocks; ++rank) {
        const uint3 in = unravel(rank, size);
        const uint3 index{place.x * size.x + in.x, place.y * size.y + in.y, place.z * size.z + in.z};
        set_up_block(slot * blocks + rank, cluster, rank, index);
    }
    m.live += cluster.live;
}

template <typename T> void grow(std::unique_ptr<T[]>& array, size_t& have, size_t need) {
    if (have >= need) return;
    array = std::make_unique<T[]>(need);
    have = need;
}

void prepare_machine(size_t clusters) {
    Machine& m = *machine;
    const size_t blocks = clusters * volume(m.launch->cluster);
    const size_t padded = (volume(m.launch->block) + 31) / 32 * 32;
    grow(m.clusters, m.num_clusters, clusters);
    if (m.blocks.size() < blocks) m.blocks.resize(blocks);
    grow(m.warps, m.num_warps, blocks * padded / 32);
    grow(m.threads, m.num_threads, blocks * padded);
    for (size_t i = 0; i < m.num_threads; ++i) m.threads[i].state = State::kExited;
    const Policy policies[] = {Policy::kRandom, Policy::kDeep, Policy::kWide};
    m.ready.reset(blocks * padded / 32, m.shuffled ? policies[next_random(m.random) % 3] : Policy::kDeep);
    m.offsets.assign(m.offsets.size(), 0);
    m.static_bytes = 0;
    m.live = 0;
}

void run_group(const std::vector<uint64_t>& clusters) {
    Machine& m = *machine;
    prepare_machine(clusters.size());
    for (size_t i = 0; i < clusters.size(); ++i) set_up_cluster(i, clusters[i]);
    m.current = pick();
    here = &m.current->position;
    emulator_switch(&m.scheduler, m.current->stack_pointer, &kNothing);
    if (m.live > 0) report_deadlock();
    m.current = nullptr;
    here = nullptr;
}

uint64_t number_from_environment(const char* name, uint64_t otherwise) {
    const char* text = getenv(name);
    return text == nullptr ? otherwise : strtoull(text, nullptr, 10);
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------------
// What device.h promises

uint64_t collective(Operation operation, unsigned mask, uint64_t value, unsigned argument) {
    Thread& thread = *machine->current;
    Warp& warp = *thread.warp;
    const unsigned me = thread.position.lane;
    warp.operations[me] = operation;
    warp.masks[me] = mask;
    warp.values[me] = value;
    warp.arguments[me] = argument;
    if ((mask & ~warp.live) != 0 || !(mask >> me & 1)) refuse_mask(warp, me);
    warp.waiting |= 1u << me;
    if ((warp.waiting & mask) == mask && finish_collective(warp, me)) return warp.results[me];
    return wait_in(thread, State::kCollective, &warp.results[me]);
}

unsigned active_lanes() { return 1u << machine->current->position.lane; }

// Barrier `id`, which the running thread comes to with `threads` threads in all.
Barrier& named_barrier(unsigned id, unsigned threads) {
    if (id >= kNamedBarriers) fail("barrier %u: there are %u", id, kNamedBarriers);
    Barrier& barrier = machine->current->block->barriers[id];
    if ((!barrier.waiting.empty() || barrier.arrived > 0) && barrier.threads != threads) {
        fail("barrier %u waits for %u threads, not %u", id, barrier.threads, threads);
    }
    barrier.threads = threads;
    return barrier;
}

void barrier_arrive(unsigned id, unsigned threads) {
    Barrier& barrier = named_barrier(id, threads);
    ++barrier.arrived;
    if (is_full(*machine->current->block, barrier)) release_barrier(barrier);
}

BarrierResult barrier(unsigned id, unsigned threads, bool predicate) {
    Thread& me = *machine->current;
    Barrier& barrier = named_barrier(id, threads);
    barrier.ones += predicate;
    barrier.waiting.push_back(&me);
    if (is_full(*me.block, barrier)) {
        release_barrier(barrier);
        return bits_as<BarrierResult>(me.barrier_result);
    }
    return bits_as<BarrierResult>(wait_in(me, State::kBarrier, &me.barrier_result));
}

void cluster_arrive() {
    Thread& me = *machine->current;
    Cluster& cluster = *me.block->cluster;
    me.cluster_phase = cluster.phase;
    if (++cluster.arrived == cluster.live) release_cluster(cluster);
}

void cluster_wait() {
    Thread& me = *machine->current;
    Cluster& cluster = *me.block->cluster;
    if (cluster.phase != me.cluster_phase) return;
    cluster.waiting.push_back(&me);
    wait_in(me, State::kCluster, &kNothing);
}

unsigned cluster_rank() { return machine->current->block->rank; }

unsigned cluster_size() { return machine->current->block->cluster->size; }

void* cluster_address(const void* mine, unsigned rank) {
    const Block& block = *machine->current->block;
    const auto offset = static_cast<const char*>(mine) - block.shared;
    if (offset < 0 || static_cast<size_t>(offset) > kSharedPages) fail("%p is not in the block's shared memory", mine);
    if (rank >= block.cluster->size) fail("block %u of a cluster of %u", rank, block.cluster->size);
    return machine->blocks[block.cluster->first_block + rank].shared + offset;
}

namespace {

// Nothing but waiting has happened for long: is there hope in the blocks that other workers run?
void look_for_the_end() {
    Machine& m = *machine;
    const auto now = std::chrono::steady_clock::now();
    if (m.yields == kYieldsPerLook) m.waiting_since = now;
    const std::chrono::duration<double> waited = now - m.waiting_since;
    if (waited.count() > kEndlessSeconds) fail("waits without end: no other thread does anything any more");
}

}  // namespace

void yield() {
    Machine& m = *machine;
    if (++m.yields % kYieldsPerLook == 0) look_for_the_end();
    m.yielded.push_back(m.current);
    suspend(*m.current, &kNothing);
}

void yield_to_other_devices() {
    sched_yield();
    yield();
}

void pass_atomic() {
    Machine& m = *machine;
    const bool now = m.shuffled ? next_random(m.random) % 4 == 0 : ++m.atomics % kAtomicsPerYield == 0;
    if (now) yield();
}

void check_alignment(const void* address, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
        fail("access to %p, which is not aligned to %zu bytes", address, alignment);
    }
}

void* dynamic_shared() { return machine->current->block->shared + kSharedPages - machine->dynamic_bytes; }

unsigned new_static_shared() {
    static unsigned variables = 0;
    return __atomic_add_fetch(&variables, 1, __ATOMIC_RELAXED);
}

void* static_shared(unsigned variable, size_t size, size_t alignment) {
    Machine& m = *machine;
    if (m.offsets.size() <= variable) m.offsets.resize(variable + 1, 0);
    size_t& end = m.offsets[variable];
    if (end == 0) {
        end = (m.static_bytes + alignment - 1) / alignment * alignment + size;
        m.static_bytes = end;
        if (end > kMaxStaticShared) fail("more than %zu bytes of static shared memory", kMaxStaticShared);
        for (Block& block : m.blocks) {
            if (block.live > 0) memset(block.shared + end - size, kPoison, size);
        }
    }
    return m.current->block->shared + end - size;
}

// ------------------------------------------------------------------------------------------------------------------
// Launches

namespace {

Kernel* all_kernels = nullptr;

// A permutation of 0 .. count: i * step + start.
struct Order {
    uint64_t count, step, start;
    uint64_t operator()(uint64_t i) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + start) % count);
    }
};

uint64_t common_divisor(uint64_t a, uint64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

Order shuffled_order(uint64_t count, uint64_t random) {
    uint64_t step = next_random(random) % count | 1;
    while (common_divisor(step, count) != 1) ++step;
    return {count, step, next_random(random) % count};
}

// The groups of one launch, from which workers help themselves.
struct Work {
    const Launch& launch;
    uint64_t seed, random;
    uint64_t clusters, together;
    Order order;
    std::atomic<uint64_t> next{0};
};

void run_work(Work& work, Machine& m) {
    machine = &m;
    m.launch = &work.launch;
    m.shuffled = work.seed != 0;
    m.dynamic_bytes = (work.launch.dynamic_shared + 15) / 16 * 16;
    std::vector<uint64_t> group;
    for (uint64_t i; (i = work.next.fetch_add(work.together)) < work.clusters;) {
        group.clear();
        for (uint64_t j = i; j < std::min(i + work.together, work.clusters); ++j) group.push_back(work.order(j));
        m.random = work.random + i;
        run_group(group);
    }
    m.launch = nullptr;
    machine = nullptr;
}

// Faults are handled on a stack of their own, which threads of this library have to bring along.
void run_work_in_thread(Work& work, Machine& m) {
    static thread_local char stack[64 * 1024];
    const stack_t alternative{stack, 0, sizeof stack};
    sigaltstack(&alternative, nullptr);
    run_work(work, m);
    const stack_t none{nullptr, SS_DISABLE, 0};
    sigaltstack(&none, nullptr);
}

uint64_t workers_for(const Work& work) {
    static const uint64_t most = std::clamp<uint64_t>(
        number_from_environment("CANDLE_MOE_EMULATOR_WORKERS", std::thread::hardware_concurrency()), 1, 256);
    const uint64_t threads = work.clusters * volume(work.launch.cluster) * volume(work.launch.block);
    const uint64_t groups = (work.clusters + work.together - 1) / work.together;
    return threads < kThreadsWorthWaking ? 1 : std::min(most, groups);
}

// Machines that run nothing: kernels of several threads may run at once.
std::mutex spare_lock;
std::deque<std::deque<Machine>>& spare = *new std::deque<std::deque<Machine>>;

std::deque<Machine> machines_for(uint64_t workers) {
    std::deque<Machine> machines;
    {
        const std::lock_guard<std::mutex> guard(spare_lock);
        if (!spare.empty()) machines = std::move(spare.back()), spare.pop_back();
    }
    if (machines.size() < workers) machines.resize(workers);
    return machines;
}

void take_back(std::deque<Machine> machines) {
    const std::lock_guard<std::mutex> guard(spare_lock);
    spare.push_back(std::move(machines));
}

}  // namespace

void add_kernel(Kernel* kernel) {
    const Kernel* other = find_kernel(kernel->name);
    if (other != nullptr) fail("kernel %s is in %s and in %s", kernel->name, other->file, kernel->file);
    kernel->next = all_kernels;
    all_kernels = kernel;
}

const Kernel* find_kernel(const char* name) {
    for (const Kernel* kernel = all_kernels; kernel != nullptr; kernel = kernel->next) {
        if (strcmp(kernel->name, name) == 0) return kernel;
    }
    return nullptr;
}

void execute(const Launch& launch) {
    static const uint64_t seed = number_from_environment("CANDLE_MOE_EMULATOR_SEED", 0);
    static const uint64_t resident = std::max<uint64_t>(number_from_environment("CANDLE_MOE_EMULATOR_RESIDENT", 1), 1);
    static std::atomic<uint64_t> launches{0};
    uint64_t random = seed + ++launches * 0x632be59bd9b4e019u;
    random = next_random(random);
    const uint64_t clusters = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z / volume(launch.cluster);
    const uint64_t together = launch.cooperative ? clusters : std::min(resident, clusters);
    const Order order = seed == 0 ? Order{clusters, 1, 0} : shuffled_order(clusters, random);
    Work work{launch, seed, random, clusters, together, order};
    const uint64_t workers = workers_for(work);
    std::deque<Machine> machines = machines_for(workers);
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < workers; ++i) others.emplace_back(run_work_in_thread, std::ref(work), std::ref(machines[i]));
    run_work(work, machines[0]);
    for (std::thread& other : others) other.join();
    take_back(std::move(machines));
}

// ------------------------------------------------------------------------------------------------------------------
// Faults

bool describe_current(char* text, size_t size) {
    if (machine == nullptr || machine->launch == nullptr || here == nullptr) return false;
    const uint3 b = here->block, t = here->thread;
    snprintf(text, size, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", machine->launch->kernel->name, b.x, b.y, b.z,
             t.x, t.y, t.z);
    return true;
}

void print_source_of(const void* code) {
    Dl_info info;
    if (dladdr(code, &info) == 0 || info.dli_fname == nullptr) return;
    char command[1024];
    const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
    snprintf(command, sizeof command, "addr2line -C -i -f -p -s -e '%s' %#tx 1>&2", info.dli_fname, offset);
    fprintf(stderr, "cuda emulator: at ");
    fflush(stderr);
    if (system(command) != 0) fprintf(stderr, "%s+%#tx\n", info.dli_fname, offset);
}

namespace {

// Where the kernel called into this library.
void print_source_of_kernel() {
    Dl_info own, other;
    void* frames[16];
    const int count = backtrace(frames, 16);
    if (dladdr(reinterpret_cast<void*>(&print_source_of), &own) == 0) return;
    for (int i = 0; i < count; ++i) {
        if (dladdr(frames[i], &other) == 0 || other.dli_fbase == own.dli_fbase) continue;
        return print_source_of(frames[i]);
    }
}

}  // namespace

void fail(const char* format, ...) {
    char who[256], what[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    if (describe_current(who, sizeof who)) {
        fprintf(stderr, "\ncuda emulator: %s: %s\n", who, what);
        print_source_of_kernel();
    } else {
        fprintf(stderr, "\ncuda emulator: %s\n", what);
    }
    abort();
}

namespace {

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction previous[64];

// Shared memory and stacks of the running group.
void describe_place(const void* address, char* text, size_t size) {
    Machine& m = *machine;
    const char* at = static_cast<const char*>(address);
    for (const Block& block : m.blocks) {
        const char* region = block.shared;
        if (region == nullptr || at < region || at >= region + kSharedPages + kPage) continue;
        const char* what = at >= region + kSharedPages ? "past the block's dynamic shared memory"
                                                       : "in the shared memory of a block that has exited";
        snprintf(text, size, "%s", what);
        return;
    }
    for (const char* stack : m.stacks) {
        if (at < stack - kPage || at >= stack) continue;
        snprintf(text, size, "the thread needs more than %zu bytes of stack", kStack);
        return;
    }
    if (!describe_address(address, text, size)) snprintf(text, size, "not in device memory");
}

void on_fault(int number, siginfo_t* info, void* context) {
    char who[256], place[256] = "";
    if (!describe_current(who, sizeof who)) {
        sigaction(number, &previous[number], nullptr);  // the instruction faults again
        return;
    }
    auto* code = reinterpret_cast<char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (number == SIGSEGV || number == SIGBUS) {
        describe_place(info->si_addr, place, sizeof place);
        fprintf(stderr, "\ncuda emulator: %s: invalid access to %p: %s\n", who, info->si_addr, place);
    } else {
        const char* what = number == SIGFPE ? "division by zero" : "misaligned access, array index or shift out of range";
        fprintf(stderr, "\ncuda emulator: %s: %s\n", who, what);
    }
    print_source_of(code + 1);
    signal(SIGABRT, SIG_DFL);
    abort();
}

}  // namespace

void catch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : kFaults) sigaction(number, &action, &previous[number]);
}

}  // namespace emulator
