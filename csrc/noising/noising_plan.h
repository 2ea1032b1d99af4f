// SPDX-License-Identifier: Apache-2.0
// Launch plan of mask_tokens: items of 4 positions of one row, a contiguous range of them a block.
#pragma once

#include <algorithm>

#include "../common/kernel_plan.h"

namespace diffullama {

constexpr int kMaskTokensThreads = 256;
constexpr int kMaskTokensBlocksPerSm = 4;  // __launch_bounds__ holds the registers down to it
constexpr int kMaskTokensMaxBlocks = 4096;

// All blocks are resident together, or the grid barrier would hang.
inline KernelPlan plan_mask_tokens(int64_t B, int64_t L, bool has_maskable, bool p_by_token, int n_sm) {
  const int64_t wanted = ceil_div(B * ceil_div(L, 4), kMaskTokensThreads);
  const int64_t resident = std::min<int64_t>(int64_t{n_sm} * kMaskTokensBlocksPerSm, kMaskTokensMaxBlocks);
  KernelPlan plan{"mask_tokens_kernel"};
  plan.grid = std::min(wanted, resident);
  plan.block = kMaskTokensThreads;
  const int64_t read = 8 + (has_maskable ? 1 : 0) + (p_by_token ? 4 : 0), written = 8 + 1 + 8;  // xt, masked, positions
  plan.bytes = B * L * (read + written) + B * (8 + 8 + (p_by_token ? 0 : 4));
  return plan;
}

}  // namespace diffullama
