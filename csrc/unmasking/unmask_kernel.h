// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "unmasking_math.h"

namespace diffullama {

// Contiguous tensors; B batch, L length.
struct UnmaskParams {
  const int64_t* xt;            // [B, L]
  const bool* masked;           // [B, L]
  const int64_t* token;         // [B, L]
  const float* confidence;      // [B, L]
  const float* amount;          // [B]
  const int64_t* seed;          // [1]
  const int64_t* step;          // [1]
  const int64_t* sample_index;  // [B]
  int64_t* xt_out;              // [B, L]
  bool* committed;              // [B, L]
  int64_t* remaining;           // [B]
  int64_t B, L;                 // L at most kUnmaskMaxLength
  Rule rule;
};

cudaError_t launch_unmask(const UnmaskParams& p, cudaStream_t stream);

}  // namespace diffullama
