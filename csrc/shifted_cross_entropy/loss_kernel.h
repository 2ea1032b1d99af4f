// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace diffullama {

enum class Element { kFloat, kDouble, kHalf, kBFloat16 };

// What every loss kernel needs; contiguous but for the row stride. "wide" is double for double logits, else float.
struct LossTargets {
  const int64_t* x0;   // [B, L]
  const bool* masked;  // [B, L]
  int64_t B, L, V;
  bool shift;
  double label_smoothing, softcap;
};

// The scored tokens of a batch, in order: flat indices b * L + j, and their number.
struct ScoredTokens {
  int64_t* token;  // [max_scored]
  int64_t* count;  // [1]; may exceed max_scored: the tokens past it are not computed
  int64_t max_scored;
};

// Rows first .. first + n - 1 of the scored tokens, staged in buffers of the linear form.
struct ChunkParams {
  LossTargets targets;
  ScoredTokens scored;
  int64_t first, n;
  const void* hidden;  // [B, L, H] element
  void* rows;          // [n, H] element
  void* logits;        // [n, V] element, row stride `stride`
  const void* bias;    // [V] element or null
  const void* scale;   // [B, L] wide: what a token's gradient is multiplied by
  void* nll;           // [B, L] wide
  const void* drows;   // [n, H] element
  void* dhidden;       // [B, L, H] element
  void* dbias;         // [V] float or double
  int64_t H, stride;
  bool dbias_is_double;
};

struct LogitsParams {
  LossTargets targets;
  const void* logits;  // [B, L, V] element
  void* nll;           // [B, L] wide (forward)
  void* lse;           // [B, L] wide
  const void* dnll;    // [B, L] wide (backward)
  void* dlogits;       // [B, L, V] element (backward)
};

struct SumsParams {
  ScoredTokens scored;
  const void* nll;     // [B, L] wide
  const void* weight;  // [B, L] wide
  void* weighted;      // [] wide
  void* plain;         // [] wide
  bool is_double;
};

// Lists the scored tokens; nll [B, L] (wide) becomes NaN at those past max_scored.
cudaError_t launch_scored_tokens(const LossTargets& t, const ScoredTokens& out, void* nll, bool nll_is_double,
                                 cudaStream_t stream);
cudaError_t launch_gather_rows(const ChunkParams& p, int element_size, cudaStream_t stream);
cudaError_t launch_scatter_rows(const ChunkParams& p, int element_size, cudaStream_t stream);
cudaError_t launch_chunk_loss(const ChunkParams& p, Element element, bool with_grad, cudaStream_t stream);
cudaError_t launch_column_sums(const ChunkParams& p, Element element, cudaStream_t stream);
cudaError_t launch_sums(const SumsParams& p, cudaStream_t stream);
cudaError_t launch_logits_forward(const LogitsParams& p, Element element, cudaStream_t stream);
cudaError_t launch_logits_backward(const LogitsParams& p, Element element, cudaStream_t stream);

}  // namespace diffullama
