// SPDX-License-Identifier: Apache-2.0
// Block-wide integer reductions and scans; device only.
#pragma once

#include "simt.cuh"

namespace diffullama {

__device__ __forceinline__ int64_t warp_sum(int64_t v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset);
  return v;  // in lane 0
}

__device__ __forceinline__ int warp_inclusive_scan(int v) {
  const int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, v, offset);
    if (lane >= offset) v += other;
  }
  return v;
}

// Sum over the block, to every thread. shared holds kThreads / kWarp values.
template <int kThreads>
__device__ __forceinline__ int64_t block_sum(int64_t v, int64_t* shared) {
  v = warp_sum(v);
  __syncthreads();  // shared may still be read from an earlier call
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += shared[w];
  return total;
}

// Exclusive scan over the block; total goes to every thread. shared holds kThreads / kWarp values.
template <int kThreads>
__device__ __forceinline__ int block_exclusive_scan(int v, int* shared, int& total) {
  const int inclusive = warp_inclusive_scan(v);
  __syncthreads();
  if (threadIdx.x % kWarp == kWarp - 1) shared[threadIdx.x / kWarp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    before += w < static_cast<int>(threadIdx.x) / kWarp ? shared[w] : 0;
    total += shared[w];
  }
  return before + inclusive - v;
}

}  // namespace diffullama
