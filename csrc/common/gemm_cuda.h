// SPDX-License-Identifier: Apache-2.0
// Matrix products on the tensors' CUDA device and current stream, without allocating the result. In the simulator they
// are the CPU's.
#pragma once

#if defined(DIFFULLAMA_SIMULATED)

#include "gemm_cpu.h"

#else

#include <dlfcn.h>

#include <stdexcept>

#include "tensor.h"

// Exported by libtorch_cuda; torch's headers declare them only to CUDA builds of torch.
extern "C" {
AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2);
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                         AtenTensorHandle mat2, double beta, double alpha);
AOTITorchError torch_get_current_cuda_blas_handle(void** ret_handle);
}

namespace diffullama {

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor first_rows(Tensor& t, int64_t n) { return torch::stable::narrow(t, 0, 0, n); }

// out = a b; all of one dtype. Row strides may be padded.
inline void gemm_into(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

// cuBLAS fills what it is given.
constexpr bool products_are_new(ScalarType) { return false; }
inline Tensor new_product(const Tensor&, const Tensor&) { throw std::logic_error("cuBLAS makes no new tensor"); }

// cublasGemmEx of the cuBLAS that torch has loaded: its 16-bit inputs with a float32 result accumulated in place (beta
// 1), which no stable torch op offers. Null where it is not found.
using CublasGemmEx = int (*)(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha,
                             const void* a, int type_a, int lda, const void* b, int type_b, int ldb, const void* beta,
                             void* c, int type_c, int ldc, int compute_type, int algorithm);

inline CublasGemmEx find_cublas_gemm_ex() {
  if (void* found = dlsym(RTLD_DEFAULT, "cublasGemmEx")) return reinterpret_cast<CublasGemmEx>(found);
  for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    if (void* found = dlsym(library, "cublasGemmEx")) return reinterpret_cast<CublasGemmEx>(found);
  }
  return nullptr;
}

// out [m, n] float32 += a^T b for 16-bit a [k, m] and b [k, n], both with unit last stride. Row-major out is
// column-major out^T = b^T a, hence the order of the operands.
inline bool gemm_add_float(Tensor& out, const Tensor& a, const Tensor& b) {
  static const CublasGemmEx gemm_ex = find_cublas_gemm_ex();
  if (gemm_ex == nullptr) return false;
  constexpr int kNone = 0, kTranspose = 1, kFloat32 = 0, kFloat16 = 2,
                kBFloat16 = 14;                            // cublasOperation_t, cudaDataType
  constexpr int kCompute32F = 68, kDefaultAlgorithm = -1;  // cublasComputeType_t, cublasGemmAlgo_t
  const int type = a.scalar_type() == ScalarType::Half ? kFloat16 : kBFloat16;
  const int m = static_cast<int>(out.size(0)), n = static_cast<int>(out.size(1)), k = static_cast<int>(a.size(0));
  const float one = 1.0f;
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const int status = gemm_ex(handle, kNone, kTranspose, n, m, k, &one, b.data_ptr(), type,
                             static_cast<int>(b.stride(0)), a.data_ptr(), type, static_cast<int>(a.stride(0)), &one,
                             out.data_ptr(), kFloat32, static_cast<int>(out.stride(0)), kCompute32F, kDefaultAlgorithm);
  if (status != 0) throw std::runtime_error("cublasGemmEx failed with status " + std::to_string(status));
  return true;
}

// out += a b, accumulating in out's dtype where that is wider than a's and b's.
inline void gemm_add(Tensor& out, const Tensor& a, const Tensor& b) {
  const bool same = out.scalar_type() == a.scalar_type();
  if (!same && out.scalar_type() == ScalarType::Float && a.stride(0) == 1 && b.stride(1) == 1) {
    const Tensor a_rows = transposed(a);
    if (gemm_add_float(out, a_rows, b)) return;
  }
  const auto widened = [&](const Tensor& t) { return same ? t : torch::stable::to(t, out.scalar_type()); };
  const Tensor wide_a = widened(a), wide_b = widened(b);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), wide_a.get(), wide_b.get(), 1.0, 1.0));
}

}  // namespace diffullama

#endif
