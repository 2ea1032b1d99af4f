// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "token_stats_plan.h"

namespace diffullama {

enum class LogitFormat { kFloat, kHalf, kBFloat16 };

struct TokenStatsParams {
  const void* logits;        // [N, V], its rows row_stride elements apart
  const int64_t* current;    // [N] or null
  const int64_t* row_index;  // [N]
  const int64_t* seed;       // [1]
  const int64_t* step;       // [1]
  int64_t* token;            // [N]
  float* values;             // [8, N]
  int64_t N, row_stride;
  int64_t first_row;  // of this launch
  int64_t top_k;      // 0 is none
  double top_p;       // 1 is none
  float temperature;  // above 0 where tokens are drawn
  int V, forbid;      // forbid < 0 is none
  TokenStatsLayout layout;
};

// layout and first_row are set here.
cudaError_t launch_token_stats(TokenStatsParams p, LogitFormat format, Draw draw, cudaStream_t stream);

}  // namespace diffullama
