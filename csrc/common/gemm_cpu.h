// SPDX-License-Identifier: Apache-2.0
// Matrix products through torch's own CPU GEMMs: its BLAS, which fills a given tensor, and oneDNN, which makes a new
// one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensor.h"

// torch's oneDNN linear, x w^T of float32. Its header declares it only to builds with ATen's configuration; weak,
// because a torch built without oneDNN lacks it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t n_scalars, const char** algorithm, AtenTensorHandle* out);

namespace diffullama {

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor first_rows(Tensor& t, int64_t n) { return torch::stable::narrow(t, 0, 0, n); }

// out = a b; all of one dtype.
inline void gemm_into(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// On AMD's processors MKL keeps to 256-bit vectors; oneDNN is twice as fast there and nowhere slower. The simulator's
// kernels need the row stride of the buffer given to gemm_into.
inline bool products_are_new([[maybe_unused]] ScalarType dtype) {
#if defined(DIFFULLAMA_SIMULATED)
  return false;
#else
  return dtype == ScalarType::Float && aoti_torch_cpu__linear_pointwise != nullptr;
#endif
}

// a b, contiguous, in new memory; float32, where products_are_new.
inline Tensor new_product(const Tensor& a, const Tensor& b) {
  AtenTensorHandle out = nullptr;
  const Tensor b_rows = transposed(b);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(a.get(), b_rows.get(), nullptr, "none", nullptr, 0, nullptr, &out));
  return Tensor(out);
}

// out += a b, accumulating in out's dtype where that is wider.
inline void gemm_add(Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
    return;
  }
  const auto widened = [&](const Tensor& t) { return torch::stable::to(t, out.scalar_type()); };
  const Tensor wide_a = widened(a), wide_b = widened(b);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), wide_a.get(), wide_b.get(), 1.0, 1.0));
}

}  // namespace diffullama
