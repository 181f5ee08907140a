// A stand-in for the CUDA driver that runs the kernels of this crate on the CPU, so that the tests of the feature `cuda` run
// on machines without a GPU, unmodified:
//
//     scripts/cuda-emulator DIR
//     LD_LIBRARY_PATH=DIR cargo test --release --features cuda --test it cuda::
//
//     driver.cpp     the driver's functions (this file)
//     execute.cpp    threads, warps, blocks, clusters; what CANDLE_MOE_EMULATOR_SEED and _RESIDENT do
//     memory.cpp     device memory with guard pages
//     device.h       the CUDA C++ of the kernels
//     translate.py   what device.h cannot do
//     nccl.cpp       NCCL among threads
//     self_test.*    whether all this works: LD_LIBRARY_PATH=DIR DIR/self-test
//
// It is about right and wrong, and says nothing about speed. One device of compute capability 9.0, that of an H100, but for
// what CANDLE_MOE_EMULATOR_MULTIPROCESSORS=n and CANDLE_MOE_EMULATOR_SHARED=bytes (of a block, at most) say; or, with
// CANDLE_MOE_EMULATOR_DEVICES=n, several of them, which share their memory. Every operation
// is done when it is called; on a stream that is being captured it is recorded, and done by cuGraphLaunch.
// Images of modules are not read: kernels are found by name among all that are emulated (kernels/*.so in the folder of this
// library), so no two may share a name. Functions of the driver that are not here give CUDA_ERROR_NOT_SUPPORTED and say so
// on stderr.
//
// Limits: a captured graph cannot be looked into or changed; a kernel that faults ends the program; all launches run one
// at a time.

#include <cuda.h>

#include "emulator.h"

#include <dirent.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <set>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using emulator::Kernel;
using emulator::Launch;

constexpr int kDefaultShared = 48 * 1024;
constexpr int kSharedPerMultiprocessor = 228 * 1024;
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kMostDevices = 16;
constexpr int kPortableCluster = 8;
constexpr int kLargestCluster = 16;

using Work = std::function<void()>;

int number_from_environment(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text == nullptr ? otherwise : atoi(text);
}

int multiprocessors() {
    static const int number = std::max(1, number_from_environment("CANDLE_MOE_EMULATOR_MULTIPROCESSORS", 132));
    return number;
}

int devices() {
    static const int number = std::clamp(number_from_environment("CANDLE_MOE_EMULATOR_DEVICES", 1), 1, kMostDevices);
    return number;
}

int shared_of_block() {
    constexpr int kMost = static_cast<int>(emulator::kMaxShared);
    static const int bytes = std::clamp(number_from_environment("CANDLE_MOE_EMULATOR_SHARED", kMost), kDefaultShared, kMost);
    return bytes;
}

}  // namespace

struct CUctx_st {};

struct CUgraph_st {
    std::vector<Work> work;
    bool invalid = false;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    std::thread::id thread = std::this_thread::get_id();
};

struct CUgraphExec_st {
    std::vector<Work> work;
};

struct CUstream_st {
    std::shared_ptr<CUgraph_st> capture;
    bool began_capture = false;
};

struct CUevent_st {
    std::shared_ptr<CUgraph_st> capture;
};

struct CUfunc_st {
    const Kernel* kernel;
    CUmodule module;
    int max_dynamic = kDefaultShared;
    bool any_cluster = false;
};

struct CUmod_st {
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

namespace {

std::recursive_mutex the_lock;  // over everything
CUctx_st contexts[kMostDevices];
CUstream_st the_default_stream;
std::vector<std::weak_ptr<CUgraph_st>> captures;
thread_local CUcontext current_context = nullptr;
bool initialized = false;

thread_local int locks = 0;  // that this thread holds

class Guard {
public:
    explicit Guard(std::recursive_mutex& mutex) : mutex_(mutex) { mutex_.lock(), ++locks; }
    ~Guard() { --locks, mutex_.unlock(); }
    Guard(const Guard&) = delete;

private:
    std::recursive_mutex& mutex_;
};

// Lets the other threads on while this one runs a kernel, which may wait for what a kernel on another device does.
class Unlocked {
public:
    Unlocked() : held_(locks) {
        for (locks = 0; given_back_ < held_; ++given_back_) the_lock.unlock();
    }
    ~Unlocked() {
        for (; locks < held_; ++locks) the_lock.lock();
    }
    Unlocked(const Unlocked&) = delete;

private:
    int held_, given_back_ = 0;
};

CUstream_st& stream_of(CUstream stream) {
    thread_local CUstream_st of_thread;
    if (stream == CU_STREAM_PER_THREAD) return of_thread;
    return stream == nullptr || stream == CU_STREAM_LEGACY ? the_default_stream : *stream;
}

// What a function does that would wait for the device: it breaks the captures that forbid that.
CUresult check_no_capture() {
    CUresult result = CUDA_SUCCESS;
    for (const auto& weak : captures) {
        const auto capture = weak.lock();
        if (!capture || capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
        const bool is_mine = capture->thread == std::this_thread::get_id();
        if (capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && !is_mine) continue;
        capture->invalid = true;
        result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return result;
}

CUresult check_context() {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return current_context == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

// Does the work now, or records it where the stream is captured.
CUresult enqueue(CUstream handle, Work work) {
    const Guard guard(the_lock);
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    CUstream_st& stream = stream_of(handle);
    if (stream.capture) {
        stream.capture->work.push_back(std::move(work));
    } else {
        work();
    }
    return CUDA_SUCCESS;
}

// Work of a function that comes back when it is done.
template <typename F> CUresult at_once(F&& work) {
    const Guard guard(the_lock);
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    if (const CUresult result = check_no_capture(); result != CUDA_SUCCESS) return result;
    return work();
}

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

// ------------------------------------------------------------------------------------------------------------------
// Kernels

std::string own_folder() {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&own_folder), &info) == 0) return ".";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

void load_kernels() {
    const std::string folder = own_folder() + "/kernels";
    DIR* directory = opendir(folder.c_str());
    if (directory == nullptr) return;
    while (const dirent* entry = readdir(directory)) {
        const std::string name = entry->d_name;
        if (name.size() < 4 || name.substr(name.size() - 3) != ".so") continue;
        const std::string path = folder + "/" + name;
        if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) emulator::fail("%s", dlerror());
    }
    closedir(directory);
}

// A launch with a copy of its arguments.
class OwnedLaunch {
public:
    OwnedLaunch(const Launch& launch, void** arguments) : launch_(launch) {
        const Kernel& kernel = *launch.kernel;
        size_t total = 0;
        for (unsigned i = 0; i < kernel.num_parameters; ++i) total += slot(kernel.sizes[i]);
        bytes_ = std::make_unique<Slot[]>(total);
        total = 0;
        for (unsigned i = 0; i < kernel.num_parameters; ++i) {
            pointers_.push_back(&bytes_[total]);
            memcpy(pointers_.back(), arguments[i], kernel.sizes[i]);
            total += slot(kernel.sizes[i]);
        }
    }

    void run() {
        launch_.arguments = pointers_.data();
        const Unlocked unlocked;
        emulator::execute(launch_);
    }

private:
    struct alignas(16) Slot {
        char bytes[16];
    };
    static size_t slot(size_t size) { return (size + sizeof(Slot) - 1) / sizeof(Slot); }

    Launch launch_;
    std::unique_ptr<Slot[]> bytes_;
    std::vector<void*> pointers_;
};

CUresult check_shape(const CUfunc_st& function, const Launch& launch) {
    const auto positive = [](dim3 d) { return d.x > 0 && d.y > 0 && d.z > 0; };
    const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
    if (!positive(grid) || !positive(block) || !positive(cluster)) return CUDA_ERROR_INVALID_VALUE;
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads > emulator::kMaxThreads || block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    if (function.kernel->max_threads != 0 && threads > function.kernel->max_threads) return CUDA_ERROR_INVALID_VALUE;
    if (launch.dynamic_shared > static_cast<size_t>(function.max_dynamic)) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t blocks = uint64_t(cluster.x) * cluster.y * cluster.z;
    if (blocks > static_cast<uint64_t>(function.any_cluster ? kLargestCluster : kPortableCluster)) {
        return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    }
    const bool whole = grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
    return whole ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CLUSTER_SIZE;
}

CUresult launch_kernel(CUfunction function, Launch launch, CUstream stream, void** arguments, void** extra) {
    if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
    launch.kernel = function->kernel;
    if (const CUresult result = check_shape(*function, launch); result != CUDA_SUCCESS) return result;
    if (arguments == nullptr && launch.kernel->num_parameters > 0) return CUDA_ERROR_INVALID_VALUE;
    const auto owned = std::make_shared<OwnedLaunch>(launch, arguments);
    return enqueue(stream, [owned] { owned->run(); });
}

int blocks_per_multiprocessor(const CUfunc_st& function, int threads, size_t dynamic_shared) {
    if (threads < 1 || threads > static_cast<int>(emulator::kMaxThreads)) return 0;
    if (dynamic_shared > static_cast<size_t>(function.max_dynamic)) return 0;
    const int by_threads = kThreadsPerMultiprocessor / ((threads + 31) / 32 * 32);
    const int by_shared = kSharedPerMultiprocessor / (static_cast<int>(dynamic_shared) + 1024);
    return std::min({by_threads, by_shared, 32});
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------------
// Device and context

EXPORT CUresult cuInit(unsigned flags) {
    const Guard guard(the_lock);
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (initialized) return CUDA_SUCCESS;
    load_kernels();
    emulator::catch_faults();
    initialized = true;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }

EXPORT CUresult cuDeviceGetCount(int* count) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return *count = devices(), CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= devices()) return CUDA_ERROR_INVALID_DEVICE;
    return *device = ordinal, CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice) {
    return snprintf(name, static_cast<size_t>(length), "candle-moe emulator"), CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    return memset(uuid, 1 + device, sizeof *uuid), CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) { return *bytes = emulator::memory_total(), CUDA_SUCCESS; }

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (device < 0 || device >= devices()) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors(); break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *value = static_cast<int>(emulator::kMaxThreads); break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 0x7fffffff; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = kDefaultShared; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_of_block(); break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = kSharedPerMultiprocessor; break;
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = kThreadsPerMultiprocessor; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1'980'000; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2'619'000; break;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: *value = 1; break;
        default: *value = 0; break;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    if (device < 0 || device >= devices()) return CUDA_ERROR_INVALID_DEVICE;
    return *context = &contexts[device], CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
    if (device < 0 || device >= devices() || peer < 0 || peer >= devices()) return CUDA_ERROR_INVALID_DEVICE;
    return *can = device != peer, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
    const Guard guard(the_lock);
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    static std::set<std::pair<CUcontext, CUcontext>> enabled;
    return enabled.emplace(current_context, peer).second ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current_context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return current_context = context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxPushCurrent(CUcontext context) { return current_context = context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxPopCurrent(CUcontext* context) {
    if (context != nullptr) *context = current_context;
    return current_context = nullptr, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxDestroy(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    return *device = static_cast<CUdevice>(current_context - contexts), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSynchronize() {
    return at_once([] { return CUDA_SUCCESS; });
}

EXPORT CUresult cuGetErrorName(CUresult error, const char** name) {
    switch (error) {
        case CUDA_SUCCESS: *name = "CUDA_SUCCESS"; break;
        case CUDA_ERROR_INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case CUDA_ERROR_OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case CUDA_ERROR_NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case CUDA_ERROR_NOT_SUPPORTED: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
        default: *name = "CUDA_ERROR"; break;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
    switch (error) {
        case CUDA_SUCCESS: *text = "no error"; break;
        case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
        case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; break;
        case CUDA_ERROR_NOT_FOUND: *text = "named symbol not found"; break;
        case CUDA_ERROR_NOT_SUPPORTED: *text = "operation not supported"; break;
        case CUDA_ERROR_INVALID_DEVICE: *text = "invalid device ordinal"; break;
        case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
            *text = "operation not permitted when stream is capturing";
            break;
        default: *text = "error of the emulated driver"; break;
    }
    return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------------
// Modules and functions

EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) {
    const Guard guard(the_lock);
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    return *module = new CUmod_st, CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}
EXPORT CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) { return cuModuleLoadData(module, image); }
EXPORT CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
EXPORT CUresult cuModuleUnload(CUmodule module) { return delete module, CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    const Guard guard(the_lock);
    if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    auto& entry = module->functions[name];
    if (!entry) {
        const Kernel* kernel = emulator::find_kernel(name);
        if (kernel == nullptr) {
            fprintf(stderr, "cuda emulator: kernel %s is not emulated\n", name);
            module->functions.erase(name);
            return CUDA_ERROR_NOT_FOUND;
        }
        entry = std::make_unique<CUfunc_st>();
        entry->kernel = kernel;
        entry->module = module;
    }
    return *function = entry.get(), CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetModule(CUmodule* module, CUfunction function) { return *module = function->module, CUDA_SUCCESS; }
EXPORT CUresult cuFuncGetName(const char** name, CUfunction function) {
    return *name = function->kernel->name, CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    const Guard guard(the_lock);
    if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value < 0 || value > shared_of_block()) return CUDA_ERROR_INVALID_VALUE;
        function->max_dynamic = std::max(value, kDefaultShared);
    } else if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) {
        function->any_cluster = value != 0;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    const unsigned max_threads = function->kernel->max_threads;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = static_cast<int>(max_threads == 0 ? emulator::kMaxThreads : max_threads);
            break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->max_dynamic; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
        case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = 90; break;
        case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: *value = function->any_cluster; break;
        default: *value = 0; break;
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, CUfunction function, int threads, size_t shared, unsigned) {
    return *blocks = blocks_per_multiprocessor(*function, threads, shared), CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSize(
    int* grid, int* block, CUfunction function, CUoccupancyB2DSize, size_t shared, int limit) {
    const unsigned bound = function->kernel->max_threads == 0 ? emulator::kMaxThreads : function->kernel->max_threads;
    *block = limit > 0 ? std::min<int>(limit, static_cast<int>(bound)) : static_cast<int>(bound);
    *grid = multiprocessors() * std::max(1, blocks_per_multiprocessor(*function, *block, shared));
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxPotentialClusterSize(int* size, CUfunction function, const CUlaunchConfig*) {
    return *size = function->any_cluster ? kLargestCluster : kPortableCluster, CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------------
// Launches

EXPORT CUresult cuLaunchKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared, CUstream stream, void** arguments, void** extra) {
    const Launch launch{
        nullptr, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), dim3(1, 1, 1), false, shared, nullptr};
    return launch_kernel(function, launch, stream, arguments, extra);
}

EXPORT CUresult cuLaunchCooperativeKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared, CUstream stream, void** arguments) {
    const Launch launch{
        nullptr, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), dim3(1, 1, 1), true, shared, nullptr};
    return launch_kernel(function, launch, stream, arguments, nullptr);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
    Launch launch{nullptr, dim3(config->gridDimX, config->gridDimY, config->gridDimZ),
                  dim3(config->blockDimX, config->blockDimY, config->blockDimZ), dim3(1, 1, 1), false,
                  config->sharedMemBytes, nullptr};
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const CUlaunchAttribute& attribute = config->attrs[i];
        if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
            const auto& dim = attribute.value.clusterDim;
            launch.cluster = dim3(dim.x, dim.y, dim.z);
        } else if (attribute.id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) {
            launch.cooperative = attribute.value.cooperative != 0;
        }
        // The others are about speed: operations of a stream are done one after another here.
    }
    return launch_kernel(function, launch, config->hStream, arguments, extra);
}

EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    return enqueue(stream, [=] { function(data); });
}

// ------------------------------------------------------------------------------------------------------------------
// Memory

EXPORT CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    return at_once([&] {
        if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        void* start = emulator::allocate(bytes);
        *address = reinterpret_cast<CUdeviceptr>(start);
        return start == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
    });
}

// Nothing is a null pointer, unlike for cuMemAlloc. While a stream is captured, memory is handed out at once, and belongs to
// the graph for good.
EXPORT CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream) {
    const Guard guard(the_lock);
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    if (bytes == 0) return *address = 0, CUDA_SUCCESS;
    void* start = emulator::allocate(bytes);
    *address = reinterpret_cast<CUdeviceptr>(start);
    return start == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t bytes, CUmemoryPool, CUstream stream) {
    return cuMemAllocAsync(address, bytes, stream);
}

namespace {

CUresult release(CUdeviceptr address) {
    if (address == 0) return CUDA_SUCCESS;
    const auto released = emulator::release(pointer(address));
    return released == emulator::Released::kDone ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

EXPORT CUresult cuMemFree(CUdeviceptr address) {
    return at_once([&] { return release(address); });
}

EXPORT CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    const Guard guard(the_lock);
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    return stream_of(stream).capture ? CUDA_SUCCESS : release(address);
}

EXPORT CUresult cuMemGetInfo(size_t* available, size_t* total) {
    *total = emulator::memory_total();
    *available = *total - emulator::memory_in_use();
    return check_context();
}

EXPORT CUresult cuMemGetAddressRange(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
    void* found = nullptr;
    size_t size = 0;
    if (!emulator::piece_of(pointer(address), &found, &size)) return CUDA_ERROR_NOT_FOUND;
    if (start != nullptr) *start = reinterpret_cast<CUdeviceptr>(found);
    if (bytes != nullptr) *bytes = size;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAllocHost(void** start, size_t bytes) {
    return *start = malloc(bytes), *start == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostAlloc(void** start, size_t bytes, unsigned) { return cuMemAllocHost(start, bytes); }
EXPORT CUresult cuMemFreeHost(void* start) { return free(start), CUDA_SUCCESS; }

namespace {

CUresult copy(void* to, const void* from, size_t bytes, CUstream stream) {
    return enqueue(stream, [=] { memmove(to, from, bytes); });
}

CUresult copy_at_once(void* to, const void* from, size_t bytes) {
    return at_once([=] { return memmove(to, from, bytes), CUDA_SUCCESS; });
}

template <typename T> CUresult fill(CUdeviceptr to, T value, size_t count, CUstream stream) {
    if (to % sizeof(T) != 0) return CUDA_ERROR_INVALID_VALUE;
    return enqueue(stream, [=] { std::fill_n(static_cast<T*>(pointer(to)), count, value); });
}

}  // namespace

EXPORT CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    return copy_at_once(pointer(to), from, bytes);
}
EXPORT CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) { return copy_at_once(to, pointer(from), bytes); }
EXPORT CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy_at_once(pointer(to), pointer(from), bytes);
}
EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return cuMemcpyDtoD(to, from, bytes); }
EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return copy(pointer(to), from, bytes, stream);
}
EXPORT CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(to, pointer(from), bytes, stream);
}
EXPORT CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(pointer(to), pointer(from), bytes, stream);
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(pointer(to), pointer(from), bytes, stream);
}
EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
    return copy(pointer(to), pointer(from), bytes, stream);
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return fill<uint8_t>(to, value, count, stream);
}
EXPORT CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
    return fill<uint16_t>(to, value, count, stream);
}
EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    return fill<uint32_t>(to, value, count, stream);
}
EXPORT CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
    return fill<uint8_t>(to, value, count, nullptr);
}
EXPORT CUresult cuMemsetD32(CUdeviceptr to, unsigned value, size_t count) {
    return fill<uint32_t>(to, value, count, nullptr);
}

// A pool is nothing but a handle, and there is one.
EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice) {
    return *pool = reinterpret_cast<CUmemoryPool>(&contexts), CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
EXPORT CUresult cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void*) { return CUDA_SUCCESS; }
EXPORT CUresult cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }

// ------------------------------------------------------------------------------------------------------------------
// Streams and events

EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned) {
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    return *stream = new CUstream_st, CUDA_SUCCESS;
}
EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
EXPORT CUresult cuStreamDestroy(CUstream stream) { return delete stream, CUDA_SUCCESS; }
EXPORT CUresult cuStreamGetCtx(CUstream, CUcontext* context) { return *context = current_context, CUDA_SUCCESS; }

EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    const Guard guard(the_lock);
    if (const CUresult result = check_context(); result != CUDA_SUCCESS) return result;
    CUstream_st& stream = stream_of(handle);
    if (!stream.capture) return CUDA_SUCCESS;
    stream.capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
EXPORT CUresult cuStreamQuery(CUstream stream) { return cuStreamSynchronize(stream); }

EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    const Guard guard(the_lock);
    CUstream_st& stream = stream_of(handle);
    if (event->capture && !stream.capture) stream.capture = event->capture;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuEventCreate(CUevent* event, unsigned) { return *event = new CUevent_st, CUDA_SUCCESS; }
EXPORT CUresult cuEventDestroy(CUevent event) { return delete event, CUDA_SUCCESS; }
EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    const Guard guard(the_lock);
    return event->capture = stream_of(stream).capture, CUDA_SUCCESS;
}
EXPORT CUresult cuEventSynchronize(CUevent event) {
    return event->capture ? CUDA_ERROR_CAPTURED_EVENT : CUDA_SUCCESS;
}
EXPORT CUresult cuEventQuery(CUevent event) { return cuEventSynchronize(event); }
EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent, CUevent) { return *milliseconds = 1.0f, CUDA_SUCCESS; }

// ------------------------------------------------------------------------------------------------------------------
// Graphs

EXPORT CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    const Guard guard(the_lock);
    CUstream_st& stream = stream_of(handle);
    if (&stream == &the_default_stream) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
    stream.capture = std::make_shared<CUgraph_st>();
    stream.capture->mode = mode;
    stream.began_capture = true;
    captures.push_back(stream.capture);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    const Guard guard(the_lock);
    CUstream_st& stream = stream_of(handle);
    *graph = nullptr;
    if (!stream.capture) return CUDA_ERROR_ILLEGAL_STATE;
    if (!stream.began_capture) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    const auto capture = std::move(stream.capture);
    stream.began_capture = false;
    captures.erase(
        std::remove_if(captures.begin(), captures.end(), [&](const auto& weak) { return weak.lock() == capture; }),
        captures.end());
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    return *graph = new CUgraph_st(*capture), CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    const Guard guard(the_lock);
    const auto& capture = stream_of(handle).capture;
    *status = !capture           ? CU_STREAM_CAPTURE_STATUS_NONE
              : capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                 : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    return *mode = CU_STREAM_CAPTURE_MODE_GLOBAL, CUDA_SUCCESS;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    return *executable = new CUgraphExec_st{graph->work}, CUDA_SUCCESS;
}
EXPORT CUresult cuGraphInstantiateWithParams(CUgraphExec* executable, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS*) {
    return cuGraphInstantiateWithFlags(executable, graph, 0);
}
EXPORT CUresult cuGraphUpload(CUgraphExec, CUstream) { return CUDA_SUCCESS; }
EXPORT CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    return enqueue(stream, [work = executable->work] {
        for (const Work& step : work) step();
    });
}
EXPORT CUresult cuGraphDestroy(CUgraph graph) { return delete graph, CUDA_SUCCESS; }
EXPORT CUresult cuGraphExecDestroy(CUgraphExec executable) { return delete executable, CUDA_SUCCESS; }
EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode*, size_t* count) {
    return *count = graph->work.size(), CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------------
// Everything else

// The weak defaults of all other functions come here.
extern "C" __attribute__((visibility("hidden"))) int emulator_missing(const char* name) {
    fprintf(stderr, "cuda emulator: %s is not emulated\n", name);
    return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORT CUresult cuGetProcAddress_v2(
    const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (status != nullptr) {
        *status = *function == nullptr ? CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND : CU_GET_PROC_ADDRESS_SUCCESS;
    }
    return *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
