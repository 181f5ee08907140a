// What the parts of the emulated CUDA driver share: memory.cpp, execute.cpp, driver.cpp. Kernels see device.h only.
#pragma once

#include "device.h"

#include <cstddef>
#include <cstdint>

namespace emulator {

// One kernel launch, as execute() runs it.
struct Launch {
    const Kernel* kernel;
    dim3 grid, block, cluster;  // cluster is (1, 1, 1) where there are none
    bool cooperative;           // all blocks are resident at once
    size_t dynamic_shared;
    void** arguments;
};

constexpr size_t kMaxStaticShared = 48 * 1024;
constexpr size_t kMaxShared = 227 * 1024;
constexpr unsigned kMaxThreads = 1024;

// execute.cpp: runs every block of the launch before it returns.
void execute(const Launch& launch);
// The kernel of this name among the loaded libraries, or null.
const Kernel* find_kernel(const char* name);
// Writes which kernel, block and thread this OS thread emulates; false where it emulates none.
bool describe_current(char* text, size_t size);
// Adds handlers for SIGSEGV and its kin that say what a kernel did; they hand everything else on.
void catch_faults();
// Says where in the source a code address lies, on stderr.
void print_source_of(const void* code);

// memory.cpp: device memory, each piece with its own guard page; never handed out twice.
void* allocate(size_t bytes);  // null: more than there is
enum class Released { kDone, kUnknown };
Released release(void* start);  // aborts where something beside the piece was written
size_t memory_in_use();
size_t memory_total();
// Says what lies at or near `address`; false where it is far from any memory of the device.
bool describe_address(const void* address, char* text, size_t size);
// The piece that holds `address`.
bool piece_of(const void* address, void** start, size_t* bytes);

}  // namespace emulator
