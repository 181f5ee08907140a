// Device memory of the emulated driver. Each piece has pages of its own and ends at a page that cannot be touched, so that
// a kernel that runs past it faults; a piece that was released cannot be touched either, and no address is used twice.
//
// Limits: the end of a piece is rounded up to 16 bytes, and writes into that rest, or before the start of the piece but in
// its first page, are found when the piece is released, reads not at all. Fresh memory holds 0xCB; of pieces above 64 MiB
// only the first and the last MiB do, and the rest is zero.

#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 16;
constexpr unsigned char kPoison = 0xCB;
constexpr size_t kPoisonedWhole = size_t(64) << 20;
constexpr size_t kPoisonedEnds = size_t(1) << 20;
constexpr size_t kTotal = size_t(16) << 30;
// Address space, not memory.
constexpr size_t kArenas[] = {size_t(32) << 40, size_t(4) << 40, size_t(256) << 30};

struct Piece {
    char* pages;
    size_t page_bytes;
    size_t bytes;
    bool live;
};

struct Memory {
    std::mutex lock;
    std::map<const char*, Piece> pieces;  // by start, released ones too
    char* arena = nullptr;
    size_t arena_bytes = 0;
    size_t arena_used = 0;
    size_t in_use = 0;
};

Memory& memory() {
    static Memory* const memory = new Memory;  // outlives the destructors of programs
    return *memory;
}

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

void reserve_arena(Memory& m) {
    for (size_t bytes : kArenas) {
        void* arena = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena == MAP_FAILED) continue;
        m.arena = static_cast<char*>(arena);
        m.arena_bytes = bytes;
        return;
    }
    fail("no address space for device memory");
}

void poison(char* start, size_t bytes) {
    if (bytes <= kPoisonedWhole) {
        memset(start, kPoison, bytes);
        return;
    }
    memset(start, kPoison, kPoisonedEnds);
    memset(start + bytes - kPoisonedEnds, kPoison, kPoisonedEnds);
}

void check_poison(const char* from, const char* to, const char* start, const Piece& piece) {
    for (const char* at = from; at < to; ++at) {
        if (static_cast<unsigned char>(*at) == kPoison) continue;
        fail("byte %td of a piece of %zu bytes at %p was written", at - start, piece.bytes, static_cast<const void*>(start));
    }
}

}  // namespace

void* allocate(size_t bytes) {
    Memory& m = memory();
    const std::lock_guard<std::mutex> guard(m.lock);
    if (bytes > kTotal || m.in_use + bytes > kTotal) return nullptr;
    if (m.arena == nullptr) reserve_arena(m);
    const size_t rounded = round_up(std::max<size_t>(bytes, 1), kAlignment);
    const size_t page_bytes = round_up(rounded, kPage);
    if (m.arena_used + page_bytes + kPage > m.arena_bytes) fail("the address space for device memory is used up");
    char* pages = m.arena + m.arena_used;
    if (mprotect(pages, page_bytes, PROT_READ | PROT_WRITE) != 0) return nullptr;
    m.arena_used += page_bytes + kPage;
    poison(pages, page_bytes);
    char* start = pages + page_bytes - rounded;
    m.pieces[start] = {pages, page_bytes, bytes, true};
    m.in_use += bytes;
    return start;
}

Released release(void* address) {
    Memory& m = memory();
    const std::lock_guard<std::mutex> guard(m.lock);
    const char* start = static_cast<char*>(address);
    const auto found = m.pieces.find(start);
    if (found == m.pieces.end() || !found->second.live) return Released::kUnknown;
    Piece& piece = found->second;
    const size_t rounded = round_up(std::max<size_t>(piece.bytes, 1), kAlignment);
    check_poison(piece.pages, start, start, piece);
    check_poison(start + piece.bytes, start + rounded, start, piece);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (mmap(piece.pages, piece.page_bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED) fail("memory cannot be released");
    piece.live = false;
    m.in_use -= piece.bytes;
    return Released::kDone;
}

size_t memory_in_use() { return memory().in_use; }

size_t memory_total() { return kTotal; }

// No lock: it is asked when a kernel has faulted.
bool describe_address(const void* address, char* text, size_t size) {
    Memory& m = memory();
    const char* at = static_cast<const char*>(address);
    if (at < m.arena || at >= m.arena + m.arena_used) return false;
    auto after = m.pieces.upper_bound(at);
    const auto before = after == m.pieces.begin() ? m.pieces.end() : std::prev(after);
    if (before != m.pieces.end() && at < before->first + before->second.bytes) {
        snprintf(text, size, "byte %td of a %spiece of %zu bytes", at - before->first,
                 before->second.live ? "" : "released ", before->second.bytes);
    } else if (before != m.pieces.end()) {
        snprintf(text, size, "%td bytes past the end of a %spiece of %zu bytes",
                 at - (before->first + before->second.bytes), before->second.live ? "" : "released ", before->second.bytes);
    } else if (after != m.pieces.end()) {
        snprintf(text, size, "%td bytes before a piece of %zu bytes", after->first - at, after->second.bytes);
    }
    return true;
}

bool piece_of(const void* address, void** start, size_t* bytes) {
    Memory& m = memory();
    const std::lock_guard<std::mutex> guard(m.lock);
    const char* at = static_cast<const char*>(address);
    const auto after = m.pieces.upper_bound(at);
    if (after == m.pieces.begin()) return false;
    const auto piece = std::prev(after);
    if (!piece->second.live || at >= piece->first + piece->second.bytes) return false;
    *start = const_cast<char*>(piece->first);
    *bytes = piece->second.bytes;
    return true;
}

}  // namespace emulator
