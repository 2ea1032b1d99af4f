// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "noising_plan.h"

namespace diffullama {

// Contiguous tensors; B batch, L length.
struct MaskTokensParams {
  const int64_t* x0;            // [B, L]
  const float* p_mask;          // [B], or [B, L] where p_by_token
  const bool* maskable;         // [B, L] or null
  const int64_t* seed;          // [1]
  const int64_t* sample_index;  // [B]
  int64_t* xt;                  // [B, L]
  bool* masked;                 // [B, L]
  int64_t* positions;           // [B * L]
  int64_t* counts;              // [B]
  int64_t* block_counts;        // [kMaskTokensMaxBlocks] scratch, uninitialised
  int64_t B, L, mask_id;
  bool p_by_token;
};

cudaError_t launch_mask_tokens(const MaskTokensParams& p, cudaStream_t stream);

}  // namespace diffullama
