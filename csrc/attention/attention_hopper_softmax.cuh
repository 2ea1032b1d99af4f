// SPDX-License-Identifier: Apache-2.0
// What a consumer thread of the sm_90a attention kernels does with its accumulators [n][2 r + c] (wgmma of hopper.cuh):
// rows 16 (its warp) + lane / 4 + 8 r, columns 8 n + 2 (lane % 4) + c.
#pragma once

#include "../common/hopper.cuh"
#include "attention_scores.cuh"

namespace diffullama {

// The maximum that is subtracted stays while the largest score exceeds it by no more: probabilities up to 2^8 cost a
// 16-bit format nothing, and outputs are seldom rescaled (Dao et al., FlashAttention-4, 2025).
constexpr float kMaxGrowth = 8.0f;  // as an exponent of 2

// Of the thread's two rows: the maximum that is subtracted, and the sum of the probabilities in its own columns.
struct SoftmaxRows {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

__device__ __forceinline__ float max_of_quad(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float sum_of_quad(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// Exponent of 2 to subtract: finite where the row has seen nothing yet, so that 2^(-inf - it) is 0. Rounded, so that an
// unchanged maximum has the factor 1 and a tile without new keys changes nothing.
__device__ __forceinline__ float exponent_of(float max, float scale) {
  return max == -INFINITY ? 0.0f : __fmul_rn(max, scale);
}

// Scores become probabilities up to the row's factor 2^-max; the factors bring what was summed before to the new
// maximum.
template <int kN>
__device__ __forceinline__ void softmax_scores(float (&s)[kN][4], SoftmaxRows& rows, float (&factor)[2], float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = rows.max[r];
#pragma unroll
    for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = max_of_quad(top);
    const float before = __fmul_rn(rows.max[r], scale);
    if (__fmul_rn(top, scale) - before > kMaxGrowth) rows.max[r] = top;
    const float exponent = exponent_of(rows.max[r], scale);
    factor[r] = exp2_approx(before - exponent);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[n][i] = exp2_approx(fmaf(s[n][i], scale, -exponent));
        sum += s[n][i];
      }
    }
    rows.sum[r] = fmaf(rows.sum[r], factor[r], sum);
  }
}

template <int kN>
__device__ __forceinline__ void scale_rows(float (&d)[kN][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] *= factor[i / 2];
  }
}

// Accumulators [64, 8 kN] as the left operands of kN / 2 products over their columns.
template <class T, int kN>
__device__ __forceinline__ void pack_left(uint32_t (&a)[kN / 2][4], const float (&d)[kN][4]) {
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = pack2<T>(d[2 * k + i / 2][i % 2 * 2], d[2 * k + i / 2][i % 2 * 2 + 1]);
  }
}

// Accumulators [64, 8 kN] to rows of 8 kN elements in global memory, of which n_rows exist: 64 bytes of a row a quad.
template <class T, int kN>
__device__ __forceinline__ void store_accumulators(const float (&d)[kN][4], T* to, int n_rows) {
  const int row = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp * 16 + lane_of() / 4, q = lane_of() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = pack2<T>(d[n + j][2 * r], d[n + j][2 * r + 1]);
      transpose_in_quad(x);
      if (row + 8 * r < n_rows) {
        *reinterpret_cast<uint4*>(to + int64_t{row + 8 * r} * (8 * kN) + 8 * (n + q)) = {x[0], x[1], x[2], x[3]};
      }
    }
  }
}

}  // namespace diffullama
