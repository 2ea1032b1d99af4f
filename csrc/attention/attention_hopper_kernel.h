// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_kernel.h"

namespace diffullama {

// fragment_mask of the words, or nulls where there are none.
struct MaskFragments {
  const uint32_t* data;  // [M, ceil(Lq / 64), ceil(Lk / 128), 128, 2]
  int64_t batch;         // stride of M; 0 where the batch shares one mask
};

// The forward for D = 64 and 128 on sm_90a. taken: a counter on the device that holds 0, from which blocks take tiles
// of queries that differ in work; null where they do not.
cudaError_t launch_attention_hopper(const AttentionParams& p, const MaskFragments& fragments, int* taken, int D,
                                    bool is_half, cudaStream_t stream);

}  // namespace diffullama
