// A stand-in for the one product of cuBLAS that Candle's float32 `matmul` is, on the emulated driver's memory. Everything else
// of the library stays a stub that scripts/cuda-emulator makes.
//
//     C = alpha op(A) op(B) + beta C     column-major, for each of a batch; sums in float64, rounded once
//
// It is enqueued on the stream of its handle, so graphs capture it too.

#include <cuda.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Status { kSuccess = 0, kInvalidValue = 7, kExecutionFailed = 13, kNotSupported = 15 };
enum Operation { kAsItIs = 0 };
constexpr int kFloat32 = 0;

struct Handle {
    CUstream stream;
};

struct Matrix {
    const float* values;
    bool transposed;
    int64_t leading, stride;

    float at(int64_t batch, int64_t row, int64_t column) const {
        const int64_t place = transposed ? column + row * leading : row + column * leading;
        return values[batch * stride + place];
    }
};

struct Product {
    int64_t m, n, k, batches;
    float alpha, beta;
    Matrix a, b;
    float* c;
    int64_t leading, stride;

    void compute() const {
        for (int64_t batch = 0; batch < batches; ++batch)
            for (int64_t column = 0; column < n; ++column)
                for (int64_t row = 0; row < m; ++row) {
                    double sum = 0;
                    for (int64_t i = 0; i < k; ++i)
                        sum += static_cast<double>(a.at(batch, row, i)) * static_cast<double>(b.at(batch, i, column));
                    float& out = c[batch * stride + row + column * leading];
                    // What `beta` is 0 for need not hold numbers.
                    out = static_cast<float>(alpha * sum + (beta == 0 ? 0 : static_cast<double>(beta) * out));
                }
    }
};

void run(void* data) {
    const Product* product = static_cast<Product*>(data);
    product->compute();
    delete product;
}

}  // namespace

EXPORT int cublasCreate_v2(Handle** handle) { return *handle = new Handle{nullptr}, kSuccess; }

EXPORT int cublasDestroy_v2(Handle* handle) { return delete handle, kSuccess; }

EXPORT int cublasSetStream_v2(Handle* handle, CUstream stream) { return handle->stream = stream, kSuccess; }

EXPORT int cublasGemmStridedBatchedEx(Handle* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                                      const void* a, int type_a, int lda, long long stride_a, const void* b, int type_b,
                                      int ldb, long long stride_b, const void* beta, void* c, int type_c, int ldc,
                                      long long stride_c, int batches, int, int) {
    // Whoever asks hears it from the result.
    if (type_a != kFloat32 || type_b != kFloat32 || type_c != kFloat32) return kNotSupported;
    if (m < 0 || n < 0 || k < 0 || batches < 0) return kInvalidValue;
    const Matrix left{static_cast<const float*>(a), op_a != kAsItIs, lda, stride_a};
    const Matrix right{static_cast<const float*>(b), op_b != kAsItIs, ldb, stride_b};
    auto* product = new Product{m, n, k, batches, *static_cast<const float*>(alpha), *static_cast<const float*>(beta),
                                left, right, static_cast<float*>(c), ldc, stride_c};
    // A graph that captures it runs it again and again: it is never given back.
    CUstreamCaptureStatus captured = CU_STREAM_CAPTURE_STATUS_NONE;
    cuStreamIsCapturing(handle->stream, &captured);
    const CUhostFn body = captured == CU_STREAM_CAPTURE_STATUS_NONE
                              ? run
                              : [](void* data) { static_cast<Product*>(data)->compute(); };
    return cuLaunchHostFunc(handle->stream, body, product) == CUDA_SUCCESS ? kSuccess : kExecutionFailed;
}
