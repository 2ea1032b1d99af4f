// SPDX-License-Identifier: Apache-2.0
// Attention backward, around the products (attention_key_gradient_kernel.cu):
//   statistics : before them; of each query sum dO * O and the logsumexp in base 2; eight lanes a query, 16 bytes a
//   lane
//                and access
//   dQ         : after them; its float32 sums (attention_query_sums.cuh), times the scale, as rows of the inputs' type
// Bound: memory. Not yet measured on GPU.
#include "../common/launch.h"
#include "attention_query_sums.cuh"
#include "attention_scores.cuh"

namespace diffullama {
namespace {

constexpr int kStatisticsLanes = 8;  // a query

template <class T>
__device__ __forceinline__ float dot8(uint4 a, uint4 b) {
  T x[8], y[8];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(static_cast<float>(x[i]), static_cast<float>(y[i]), sum);
  return sum;
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_query_statistics_kernel(const __grid_constant__ AttentionBackwardParams p) {
  const int64_t thread = int64_t{blockIdx.x} * kAttentionThreads + threadIdx.x;
  const int64_t slot = thread / kStatisticsLanes, n_slots = int64_t{p.B} * p.H * p.statistics_rows;
  const int64_t head = slot < n_slots ? slot / p.statistics_rows : 0;
  const bool exists = slot < n_slots && slot % p.statistics_rows < p.Lq;
  const int64_t row = exists ? slot % p.statistics_rows : 0;
  const T* const dout =
      row_of<T>(p.dout, static_cast<int>(head / p.H), static_cast<int>(head % p.H), static_cast<int>(row));
  const T* const out = static_cast<const T*>(p.out) + (head * p.Lq + row) * D;
  float sum = 0.0f;
#pragma unroll
  for (int chunk = static_cast<int>(thread % kStatisticsLanes); chunk < D / 8; chunk += kStatisticsLanes) {
    sum += dot8<T>(__ldg(reinterpret_cast<const uint4*>(dout) + chunk),
                   __ldg(reinterpret_cast<const uint4*>(out) + chunk));
  }
#pragma unroll
  for (int offset = kStatisticsLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (slot < n_slots && thread % kStatisticsLanes == 0) {
    const float lse = exists ? p.lse[head * p.Lq + row] : -INFINITY;
    p.statistics[slot] = make_float2(lse == -INFINITY ? INFINITY : lse * kLog2e, exists ? sum : 0.0f);
  }
}

// A warp turns 16 queries of a tile of sums into rows, 32 columns at a time: of four fragments a lane has two columns
// each, its quad eight whole ones in a row.
template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_query_gradient_kernel(const __grid_constant__ AttentionBackwardParams p) {
  static_assert(kAttentionWarps == kSumsRows / 16, "a warp for each band");
  const int tiles = (p.Lq + kSumsRows - 1) / kSumsRows, head = static_cast<int>(blockIdx.x / tiles);
  const int q0 = static_cast<int>(blockIdx.x % tiles) * kSumsRows, row0 = q0 + 16 * warp_of() + lane_of() / 4;
  float* const tile = sums_tile<D>(p.query_sums, head, p.Lq, q0);
  T* const rows = static_cast<T*>(p.dq) + (int64_t{head} * p.Lq + row0) * D + 8 * (lane_of() % 4);
#pragma unroll
  for (int n = 0; n < D / 8; n += 4) {
    uint32_t upper[4], lower[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 sum = read_fragment(sums_fragment(tile, warp_of(), n + i));
      upper[i] = pack2<T>(p.scale * sum.x, p.scale * sum.y);
      lower[i] = pack2<T>(p.scale * sum.z, p.scale * sum.w);
    }
    transpose_in_quad(upper);
    transpose_in_quad(lower);
    const auto store = [&](const uint32_t (&x)[4], int row) {
      if (row0 + row < p.Lq) {
        *reinterpret_cast<uint4*>(rows + row * D + 8 * n) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    };
    store(upper, 0);
    store(lower, 8);
  }
}

template <class T, int D>
cudaError_t launch_statistics(const AttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t grid = ceil_div(int64_t{p.B} * p.H * p.statistics_rows * kStatisticsLanes, kAttentionThreads);
  return launch(attention_query_statistics_kernel<T, D>, dim3(static_cast<unsigned>(grid)), dim3(kAttentionThreads), 0,
                stream, p);
}

template <class T, int D>
cudaError_t launch_gradient(const AttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t grid = query_gradient_grid({p.B, p.H, p.Hkv, p.Lq, p.Lk, D});
  return launch(attention_query_gradient_kernel<T, D>, dim3(static_cast<unsigned>(grid)), dim3(kAttentionThreads), 0,
                stream, p);
}

}  // namespace

cudaError_t launch_query_statistics(const AttentionBackwardParams& p, int D, bool is_half, cudaStream_t stream) {
  return with_attention_type(D, is_half, [&](auto type, auto width) {
    return launch_statistics<typename decltype(type)::type, decltype(width)::value>(p, stream);
  });
}

cudaError_t launch_query_gradient(const AttentionBackwardParams& p, int D, bool is_half, cudaStream_t stream) {
  return with_attention_type(D, is_half, [&](auto type, auto width) {
    return launch_gradient<typename decltype(type)::type, decltype(width)::value>(p, stream);
  });
}

}  // namespace diffullama
