// Tests the emulated driver: right kernels give what they should, and each mistake ends the program with its message.
//
//     scripts/cuda-emulator DIR && LD_LIBRARY_PATH=DIR DIR/self-test

#include <cuda.h>

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

struct SelfTest {
    CUdeviceptr out, in;
    uint32_t n;
};

struct Shape {
    unsigned blocks, threads, shared = 0, cluster = 1;
    bool cooperative = false;
};

constexpr uint32_t kWords = 256;
CUmodule module;
CUstream stream;
int failures = 0;

void expect(bool right, const char* what) {
    if (right) return;
    printf("FAILED: %s\n", what);
    ++failures;
}

void call(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    printf("FAILED: %s gives %d\n", what, result);
    exit(1);
}
#define CALL(EXPRESSION) call(EXPRESSION, #EXPRESSION)

CUresult launch(const char* name, Shape shape, SelfTest arguments) {
    CUfunction function;
    CALL(cuModuleGetFunction(&function, module, name));
    CUlaunchAttribute attributes[2] = {};
    attributes[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[0].value.clusterDim = {shape.cluster, 1, 1};
    attributes[1].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attributes[1].value.cooperative = shape.cooperative;
    CUlaunchConfig config = {shape.blocks, 1, 1, shape.threads, 1, 1, shape.shared, stream, attributes, 2};
    void* parameters[] = {&arguments};
    return cuLaunchKernelEx(&config, function, parameters, nullptr);
}

CUdeviceptr zeros() {
    CUdeviceptr words;
    CALL(cuMemAllocAsync(&words, kWords * 4, stream));
    CALL(cuMemsetD32Async(words, 0, kWords, stream));
    return words;
}

std::vector<uint32_t> words_of(CUdeviceptr words) {
    std::vector<uint32_t> host(kWords);
    CALL(cuMemcpyDtoHAsync(host.data(), words, kWords * 4, stream));
    return host;
}

// What the test kernel adds up for a block of 256 threads.
uint32_t sum_of_block(uint32_t block) {
    uint32_t sum = 0, lower = 0;
    for (uint32_t i = block * 256; i < (block + 1) * 256; ++i) {
        sum += i;
        if (i % 32 < 16) lower += i * 2 + 16;
    }
    return sum * 5 + lower;
}

void right_kernels() {
    const CUdeviceptr out = zeros();
    CALL(launch("self_test_sums", {5, 256, 32}, {out, 0, 0}));
    for (uint32_t block = 0; block < 5; ++block) expect(words_of(out)[block] == sum_of_block(block), "sums");
    CALL(launch("self_test_cluster", {8, 64, 4, 4}, {out, 0, 0}));
    for (uint32_t block = 0; block < 8; ++block) expect(words_of(out)[block] == (block + 1) % 4 * 101, "cluster");
    CALL(cuMemsetD32Async(out, 0, kWords, stream));
    CALL(launch("self_test_chain", {100, 32, 0, 1, true}, {out, 0, 0}));
    expect(words_of(out)[0] == 100, "chain of resident blocks");
    CALL(cuMemFreeAsync(out, stream));
}

void refusals() {
    const CUdeviceptr out = zeros();
    expect(launch("self_test_sums", {1, 512, 64}, {out, 0, 0}) != CUDA_SUCCESS, "more threads than bounds");
    expect(launch("self_test_sums", {1, 256, 100 << 10}, {out, 0, 0}) != CUDA_SUCCESS, "shared memory not asked for");
    expect(launch("self_test_cluster", {8, 64, 4, 3}, {out, 0, 0}) != CUDA_SUCCESS, "cluster does not divide");
    expect(launch("self_test_cluster", {32, 64, 4, 16}, {out, 0, 0}) != CUDA_SUCCESS, "cluster above 8");
    expect(launch("self_test_sums", {0, 256, 32}, {out, 0, 0}) != CUDA_SUCCESS, "no blocks");
    CUdeviceptr much;
    expect(cuMemAllocAsync(&much, size_t(17) << 30, stream) == CUDA_ERROR_OUT_OF_MEMORY, "17 GiB");
    CUfunction function;
    expect(cuModuleGetFunction(&function, module, "nobody") == CUDA_ERROR_NOT_FOUND, "unknown kernel");
}

void graphs() {
    const CUdeviceptr out = zeros();
    CUgraph graph;
    CUgraphExec executable;
    CALL(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    CALL(cuMemsetD32Async(out, 0, kWords, stream));
    CALL(launch("self_test_sums", {2, 256, 32}, {out, 0, 0}));
    CALL(cuStreamEndCapture(stream, &graph));
    expect(words_of(out)[1] == 0, "a captured launch has run");
    CALL(cuGraphInstantiate(&executable, graph, 0));
    CALL(cuGraphDestroy(graph));
    for (int i = 0; i < 2; ++i) {
        CALL(cuMemsetD32Async(out, 5, kWords, stream));
        CALL(cuGraphLaunch(executable, stream));
        expect(words_of(out)[1] == sum_of_block(1) && words_of(out)[2] == 0, "graph");
    }
    CALL(cuGraphExecDestroy(executable));
    CALL(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    expect(cuStreamSynchronize(stream) == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "synchronizing while capturing");
    expect(cuStreamEndCapture(stream, &graph) == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "broken capture");
    CALL(cuMemFreeAsync(out, stream));
}

// What a child process says on stderr before it dies; empty where it does not die.
template <typename F> std::string last_words(F&& mistake) {
    int pipes[2];
    if (pipe(pipes) != 0) return "";
    const pid_t child = fork();
    if (child == 0) {
        dup2(pipes[1], 2);
        close(pipes[1]);
        mistake();
        _exit(0);
    }
    close(pipes[1]);
    std::string said;
    char buffer[4096];
    for (ssize_t got; (got = read(pipes[0], buffer, sizeof buffer)) > 0;) said.append(buffer, static_cast<size_t>(got));
    close(pipes[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? said : "";
}

template <typename F> void expect_death(const char* expected, F&& mistake) {
    const std::string said = last_words(mistake);
    if (getenv("SELF_TEST_VERBOSE") != nullptr) printf("%s", said.c_str());
    if (said.find(expected) != std::string::npos) return;
    printf("FAILED: expected %s, got %s\n", expected, said.c_str());
    ++failures;
}

void mistakes() {
    const CUdeviceptr out = zeros();
    const auto run = [&](const char* name, Shape shape, uint32_t n) {
        return [=] { launch(name, shape, {out, out, n}); };
    };
    expect_death("past the end of a piece of 1024 bytes", run("self_test_past_the_end", {1, 32}, kWords));
    expect_death("past the block's dynamic shared memory", run("self_test_shared_past_the_end", {1, 32, 64}, 16));
    expect_death("misaligned", run("self_test_not_aligned", {1, 32}, 0));
    expect_death("array index", run("self_test_array_index", {1, 32}, 4));
    expect_death("exit", run("self_test_absent_lane", {1, 32}, 0));
    expect_death("with mask ffffffff meets lane", run("self_test_different_collectives", {1, 32}, 0));
    expect_death("deadlock in kernel self_test_deadlock", run("self_test_deadlock", {1, 64}, 0));
    expect_death("byte 0 of a released piece", [&] {
        const CUdeviceptr gone = zeros();
        cuMemFreeAsync(gone, stream);
        launch("self_test_past_the_end", {1, 1}, {gone, 0, 0});
    });
    expect_death("byte 1020 of a piece of 1020 bytes", [&] {
        CUdeviceptr odd;
        cuMemAllocAsync(&odd, 1020, stream);
        launch("self_test_past_the_end", {1, 1}, {odd, 0, 255});
        cuMemFreeAsync(odd, stream);
    });
}

}  // namespace

int main() {
    CUcontext context;
    CALL(cuInit(0));
    CALL(cuDevicePrimaryCtxRetain(&context, 0));
    CALL(cuCtxSetCurrent(context));
    CALL(cuStreamCreate(&stream, 0));
    CALL(cuModuleLoadData(&module, ""));
    right_kernels();
    refusals();
    graphs();
    mistakes();
    printf(failures == 0 ? "self-test: ok\n" : "self-test: %d failures\n", failures);
    return failures != 0;
}
