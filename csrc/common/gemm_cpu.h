// SPDX-License-Identifier: Apache-2.0
// Matrix products through torch's own CPU GEMM, without allocating the result.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "tensor.h"

namespace diffullama {

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor first_rows(Tensor& t, int64_t n) { return torch::stable::narrow(t, 0, 0, n); }

// out = a b; all of one dtype.
inline void gemm_into(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
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
