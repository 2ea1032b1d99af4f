// SPDX-License-Identifier: Apache-2.0
// Launch plans of the loss kernels. V columns; one block a row of logits.
#pragma once

#include <algorithm>

#include "../common/kernel_plan.h"

namespace diffullama {

constexpr int kLossThreads = 512;
constexpr int kVectorBytes = 16;  // of one load

// Logits alive on CUDA: a quarter of a GiB, so that GEMMs have thousands of rows and all buffers stay below 350 MB.
constexpr int64_t kChunkBytes = int64_t{256} << 20;

// Rows of logits alive at once where the caller names no number.
inline int64_t rows_within(int64_t chunk_bytes, int64_t V, int64_t element_size) {
  const int64_t row_bytes = std::max<int64_t>(V, 1) * element_size;
  return std::clamp<int64_t>(chunk_bytes / row_bytes / 64 * 64, 64, 8192);
}

// 16-byte vectors of a row that a thread keeps in registers between the reduction and the gradient: 4, 8 or 16, or 0
// where the row is too long (or its rows are not aligned) and is read again, from L2.
inline int resident_vectors(int64_t V, int element_size, bool aligned) {
  const int64_t needed = ceil_div(V * element_size, int64_t{kVectorBytes} * kLossThreads);
  if (!aligned || needed > 16) return 0;
  return needed <= 4 ? 4 : needed <= 8 ? 8 : 16;
}

// The fused pass over a chunk of n rows: read once, gradient written in place.
inline KernelPlan plan_chunk_loss(int64_t n, int64_t V, int element_size, bool with_grad) {
  KernelPlan plan{with_grad ? "chunk_gradient_kernel" : "chunk_nll_kernel"};
  plan.grid = n;
  plan.block = kLossThreads;
  plan.bytes = n * V * element_size * (with_grad ? 2 : 1);
  return plan;
}

// The loss of logits that are there already, n of B * L tokens scored: a block a row; the gradient is written
// everywhere.
inline KernelPlan plan_logits_loss(int64_t B, int64_t L, int64_t n, int64_t V, int element_size, bool with_grad) {
  KernelPlan plan{with_grad ? "logits_gradient_kernel" : "logits_nll_kernel"};
  plan.grid = B * L;
  plan.block = kLossThreads;
  plan.bytes = n * V * element_size + (with_grad ? B * L * V * element_size : 0) + B * L * (8 + 1 + 2 * 4);
  return plan;
}

// The linear negative log-likelihood without gradients: one GEMM a chunk, and the logits written and read once.
inline KernelPlan plan_linear_nll(int64_t n, int64_t H, int64_t V, int64_t chunk_rows, int element_size) {
  KernelPlan plan = plan_chunk_loss(chunk_rows, V, element_size, false);
  plan.flops = 2 * n * H * V;
  plan.bytes = n * V * element_size * 2 + ceil_div(n, chunk_rows) * V * H * element_size + 2 * n * H * element_size;
  return plan;
}

// The linear loss with both gradients over n scored rows: three GEMMs; weights, hidden and fp32 dW touched once a
// chunk.
inline KernelPlan plan_linear_loss(int64_t n, int64_t H, int64_t V, int64_t chunk_rows, int element_size) {
  KernelPlan plan = plan_chunk_loss(chunk_rows, V, element_size, true);
  plan.flops = 6 * n * H * V;
  const int64_t chunks = ceil_div(n, chunk_rows);
  plan.bytes = n * V * element_size * 5 + chunks * V * H * (2 * element_size + 8) + 4 * n * H * element_size;
  return plan;
}

}  // namespace diffullama
