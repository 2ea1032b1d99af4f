// SPDX-License-Identifier: Apache-2.0
// Mask words in the lanes of a warp; device only.
#pragma once

#include "../common/simt.cuh"
#include "attention_mask_math.h"

namespace diffullama {

// Bit b of lane r becomes bit r of lane b.
__device__ __forceinline__ uint32_t transpose_in_warp(uint32_t word) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    word = transpose_stage(word, __shfl_xor_sync(kAllLanes, word, distance), lane, distance);
  }
  return word;
}

}  // namespace diffullama
