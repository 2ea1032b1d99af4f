// SPDX-License-Identifier: Apache-2.0
// Matrix products through torch's own CPU GEMMs: its BLAS, which fills a given tensor, and oneDNN, which makes a new
// one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

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

// out [m, n] += t^T for contiguous float32 t [n, m]: 16 columns of t, a cache line of each row, at a time.
inline void add_transposed(Tensor& out, const Tensor& t) {
  constexpr int64_t kLine = 16;
  const int64_t m = out.size(0), n = out.size(1);
  float* sum = out.mutable_data_ptr<float>();
  const float* in = t.const_data_ptr<float>();
  torch::stable::parallel_for(0, (m + kLine - 1) / kLine, 8, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kLine; first < std::min(end * kLine, m); first += kLine) {
      const int64_t last = std::min(first + kLine, m);
      for (int64_t column = 0; column < n; ++column) {
        for (int64_t row = first; row < last; ++row) sum[row * n + column] += in[column * m + row];
      }
    }
  });
}

constexpr int64_t kSmallSum = int64_t{32} << 20;  // bytes of a sum that its next term may stand beside

// out += a b, accumulating in out's dtype where that is wider.
inline void gemm_add(Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type() && products_are_new(a.scalar_type()) && out.is_contiguous() &&
      out.numel() * static_cast<int64_t>(out.element_size()) <= kSmallSum) {
    add_transposed(out,
                   new_product(transposed(b), transposed(a)));  // oneDNN copies a transposed a, but no transposed b
    return;
  }
  if (out.scalar_type() == a.scalar_type()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
    return;
  }
  const auto widened = [&](const Tensor& t) { return torch::stable::to(t, out.scalar_type()); };
  const Tensor wide_a = widened(a), wide_b = widened(b);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), wide_a.get(), wide_b.get(), 1.0, 1.0));
}

}  // namespace diffullama
