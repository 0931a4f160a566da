// A libcublas over host memory: row-major products of the one shape that the program asks for.
#include "fake.h"

#ifndef CUDA_MAJOR
#define CUDA_MAJOR 13
#endif

#include <thread>
#include <vector>

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Kind { R_32F = 0, R_16F = 2, R_16BF = 14 };
constexpr int OP_N = 0, OP_T = 1, COMPUTE_32F = 68;
constexpr int64_t HANDLE_BYTES = 8 << 20;

struct Handle {
  void* stream = nullptr;
};

/// out[column][row] = alpha · Σ_k a[row][k] b[column][k] + beta · out: op(A) = Aᵀ, op(B) = B in BLAS's words.
struct Product {
  int rows, columns, k;
  float alpha, beta;
  const void* a;
  int a_kind, a_stride;
  const void* b;
  int b_kind, b_stride;
  float* out;
  int out_stride;

  void run() const;
  void run_rows(const std::vector<float>& wide, int first, int last) const;
};

void widen(const void* from, int kind, uint64_t first, int count, float* to) {
  for (int i = 0; i < count; i++) {
    if (kind == R_32F) to[i] = static_cast<const float*>(from)[first + i];
    else if (kind == R_16F) to[i] = half_to_float(static_cast<const uint16_t*>(from)[first + i]);
    else to[i] = float_of(uint32_t(static_cast<const uint16_t*>(from)[first + i]) << 16);
  }
}

float dot(const float* a, const float* b, int count) {
  constexpr int LANES = 16;
  float sums[LANES] = {};
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int lane = 0; lane < LANES; lane++) sums[lane] += a[i + lane] * b[i + lane];
  }
  float sum = 0;
  for (float lane : sums) sum += lane;
  for (; i < count; i++) sum += a[i] * b[i];
  return sum;
}

void Product::run_rows(const std::vector<float>& wide, int first, int last) const {
  std::vector<float> weights(k);
  for (int row = first; row < last; row++) {
    widen(a, a_kind, uint64_t(row) * a_stride, k, weights.data());
    for (int column = 0; column < columns; column++) {
      float* to = out + uint64_t(column) * out_stride + row;
      float sum = alpha * dot(weights.data(), wide.data() + uint64_t(column) * k, k);
      // beta 0 does not read what is there.
      *to = beta == 0 ? sum : sum + beta * *to;
    }
  }
}

void Product::run() const {
  std::vector<float> wide(uint64_t(columns) * k);
  for (int column = 0; column < columns; column++) {
    widen(b, b_kind, uint64_t(column) * b_stride, k, wide.data() + uint64_t(column) * k);
  }
  bool large = uint64_t(rows) * columns * k > 1 << 20;
  int half = large ? rows / 2 : 0;
  std::thread other([&] { run_rows(wide, 0, half); });
  run_rows(wide, half, rows);
  other.join();
}

uint64_t element_bytes(int kind) { return kind == R_32F ? 4 : 2; }

int enqueue(Handle* handle, const Product& p) {
  if (!handle || !fakeCudaHasContext()) return NOT_INITIALIZED;
  if (p.rows < 1 || p.columns < 1 || p.k < 1) return INVALID_VALUE;
  if (p.a_stride < p.k || p.b_stride < p.k || p.out_stride < p.rows) return INVALID_VALUE;
  auto inside = [](const void* at, int lines, int stride, int width, uint64_t bytes) {
    return fakeCudaIsDevice(at, (uint64_t(lines - 1) * stride + width) * bytes);
  };
  bool all = inside(p.a, p.rows, p.a_stride, p.k, element_bytes(p.a_kind)) &&
             inside(p.b, p.columns, p.b_stride, p.k, element_bytes(p.b_kind)) &&
             inside(p.out, p.columns, p.out_stride, p.rows, 4);
  if (!all) fake::die("a product reaches outside of device memory");
  fakeCudaCount("products", 1);
  fakeCudaEnqueue(handle->stream, "product", new std::function<void()>([p] { p.run(); }));
  return SUCCESS;
}

}  // namespace

EXPORTED int cuDevicePrimaryCtxRetain(void** context, int device);
EXPORTED int cublasCreate_v2(Handle** handle) {
  if (!fakeCudaHasContext()) return NOT_INITIALIZED;
  // For good, as some versions do.
  static void* kept = nullptr;
  if (fake::setting("FAKE_CUBLAS_KEEPS", 0) && !kept) cuDevicePrimaryCtxRetain(&kept, 0);
  if (!fakeCudaReserve(HANDLE_BYTES)) return ALLOC_FAILED;
  *handle = new Handle;
  return SUCCESS;
}
EXPORTED int cublasDestroy_v2(Handle* handle) {
  if (!fakeCudaHasContext()) fake::die("destroying cuBLAS's handle without its context");
  delete handle;
  fakeCudaReserve(-HANDLE_BYTES);
  return SUCCESS;
}
EXPORTED int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = stream;
  return SUCCESS;
}
EXPORTED int cublasGetStream_v2(Handle* handle, void** stream) {
  *stream = handle->stream;
  return SUCCESS;
}
EXPORTED int cublasSetWorkspace_v2(Handle*, void* at, size_t bytes) {
  bool aligned = uint64_t(at) % 256 == 0;
  return bytes == 0 || (aligned && fakeCudaIsDevice(at, bytes)) ? SUCCESS : INVALID_VALUE;
}
EXPORTED int cublasSetMathMode(Handle*, int) { return SUCCESS; }
EXPORTED int cublasSetPointerMode_v2(Handle*, int mode) { return mode == 0 ? SUCCESS : NOT_SUPPORTED; }
EXPORTED int cublasGetVersion_v2(Handle*, int* version) {
  *version = CUDA_MAJOR * 10000;
  return SUCCESS;
}
/// Of the library itself, by which: major, minor, patch.
EXPORTED int cublasGetProperty(int which, int* value) {
  *value = which == 0 ? CUDA_MAJOR : 0;
  return SUCCESS;
}
EXPORTED const char* cublasGetStatusName(int status) {
  return status == SUCCESS ? "CUBLAS_STATUS_SUCCESS" : status == ALLOC_FAILED ? "CUBLAS_STATUS_ALLOC_FAILED" : "CUBLAS_STATUS_OTHER";
}
EXPORTED const char* cublasGetStatusString(int status) { return status == SUCCESS ? "success" : "failure"; }

#ifndef WITHOUT_GEMM_EX
EXPORTED int cublasGemmEx(Handle* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const void* a,
                          int a_kind, int lda, const void* b, int b_kind, int ldb, const float* beta, void* c,
                          int c_kind, int ldc, int compute, int) {
  bool kinds = a_kind == b_kind && (a_kind == R_32F || a_kind == R_16F || a_kind == R_16BF);
  if (op_a != OP_T || op_b != OP_N || !kinds || c_kind != R_32F || compute != COMPUTE_32F) return NOT_SUPPORTED;
  // As for GPUs before bf16.
  if (a_kind == R_16BF && fake::setting("FAKE_CUBLAS_NO_BF16", 0)) return NOT_SUPPORTED;
  return enqueue(handle, {m, n, k, *alpha, *beta, a, a_kind, lda, b, b_kind, ldb, static_cast<float*>(c), ldc});
}
#endif
EXPORTED int cublasSgemm_v2(Handle* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const float* a,
                            int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
  if (op_a != OP_T || op_b != OP_N) return NOT_SUPPORTED;
  return enqueue(handle, {m, n, k, *alpha, *beta, a, R_32F, lda, b, R_32F, ldb, c, ldc});
}
