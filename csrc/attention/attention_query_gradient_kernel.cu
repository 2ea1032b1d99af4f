// SPDX-License-Identifier: Apache-2.0
// Attention backward, first half: statistics of the queries, then dQ.
//   statistics : sum dO * O and the logsumexp in base 2; eight lanes a query, 16 bytes a lane and access. Bound: memory
//   dQ         : a block takes a tile of queries of one head and goes through the keys: dP = dO V^T, S = Q K^T,
//                dS = P (dP - sum dO * O), dQ += dS K, all in the registers of the warp that has the rows
// P is made again from the logsumexp under the very mask of the forward. No atomics: dK and dV have a kernel of their
// own, for which S and dP are computed twice (7 products instead of 5), and repeated runs agree bit for bit.
// Not yet measured on GPU.
// ptxas spills at most 32 B of attention_query_gradient_kernel, at D = 64, 128 and 256: it needs every register.
#include "../common/launch.h"
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
  const int64_t query = thread / kStatisticsLanes, n_queries = int64_t{p.B} * p.H * p.Lq;
  const bool exists = query < n_queries;
  const int64_t head = exists ? query / p.Lq : 0, row = exists ? query % p.Lq : 0;
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
  if (exists && thread % kStatisticsLanes == 0) {
    const float lse = p.lse[query];
    p.statistics[query] = make_float2(lse == -INFINITY ? INFINITY : lse * kLog2e, sum);
  }
}

// Scores and dP of rows [16 kM] become dS, given the rows' statistics.
template <int kM, int kN>
__device__ __forceinline__ void score_gradient(float (&s)[kM][kN][4], const float (&dp)[kM][kN][4],
                                               const QueryStatistics* rows, float scale) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const QueryStatistics row = rows[16 * m + 8 * r + lane_of() / 4];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          s[m][n][c] = exp2_approx(fmaf(s[m][n][c], scale, -row.x)) * (dp[m][n][c] - row.y);
        }
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocksPerSm)
    attention_query_gradient_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr AttentionTile kTile = query_gradient_tile(D);
  constexpr int kRows = kTile.rows, kColumns = kTile.columns, kStages = kTile.stages;
  constexpr int kM = kRows / (16 * kAttentionWarps), kN = kColumns / 8;
  T* const q_tile = dynamic_shared<T>();
  T* const dout_tile = q_tile + kRows * D;
  Ring<T, kColumns, D, kStages> ring{dout_tile + kRows * D};

  const int row_tiles = (p.Lq + kRows - 1) / kRows, head = static_cast<int>(blockIdx.x / row_tiles);
  const int b = head / p.H, h = head % p.H, q0 = (row_tiles - 1 - static_cast<int>(blockIdx.x % row_tiles)) * kRows;
  const int kv_head = h / (p.H / p.Hkv), row0 = 16 * kM * warp_of(), lane_row = q0 + row0 + lane_of() % (16 * kM);
  const SequenceMask mask{p.mask, b, p.Lq, p.Lk};
  const auto class_of = [&](int n) { return mask.tile<kRows, kColumns>(q0, n * kColumns); };
  TileWalk walk(0, (p.Lk + kColumns - 1) / kColumns, class_of), ahead = walk;

  // Items of the ring: V (kItem 0) and K (1) of each tile to visit, in turn.
  const auto issue = [&](auto item, T* tile) {
    constexpr bool kSecond = decltype(item)::value % 2 == 1;
    if (!ahead.done()) {
      const AttentionOperand& operand = kSecond ? p.k : p.v;
      const int k0 = ahead.at * kColumns;
      load_tile<kColumns, D>(tile, row_of<T>(operand, b, kv_head, k0), operand.row, p.Lk - k0);
      if (kSecond) ahead.next();
    }
    cp_async_commit();
  };
  // The next item. Those before it are used up, so the buffer of the last one is filled with the item kStages after it.
  const auto take = [&](auto item) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    issue(Item<decltype(item)::value + kStages - 1>{}, ring.behind(1));
    return ring.use();
  };

  load_tile<kRows, D>(q_tile, row_of<T>(p.q, b, h, q0), p.q.row, p.Lq - q0);
  load_tile<kRows, D>(dout_tile, row_of<T>(p.dout, b, h, q0), p.dout.row, p.Lq - q0);
  issue(Item<0>{}, ring.at(0));
  if constexpr (kStages > 2) issue(Item<1>{}, ring.at(1));
  if constexpr (kStages > 3) issue(Item<2>{}, ring.at(2));
  static_assert(2 <= kStages && kStages <= 4);

  const int64_t first = int64_t{head} * p.Lq + q0 + row0;
  const int n_rows = p.Lq - q0 - row0;
  // Of the block's queries: read again at every tile, since registers are short.
  QueryStatistics* const statistics = reinterpret_cast<QueryStatistics*>(ring.at(kStages));
  static_assert(kRows <= kAttentionThreads);
  if (threadIdx.x < kRows) {
    const int i = static_cast<int>(threadIdx.x);
    statistics[i] = q0 + i < p.Lq ? __ldg(p.statistics + int64_t{head} * p.Lq + q0 + i) : make_float2(INFINITY, 0.0f);
  }
  const float scale = log2_scale(p.scale);
  float dq[kM][D / 8][4] = {};
  for (; !walk.done(); walk.next()) {
    uint32_t words[kN / 4];
    if (walk.held == TileClass::kBits) {
#pragma unroll
      for (int j = 0; j < kN / 4; ++j) words[j] = mask.word(lane_row, walk.at * (kColumns / 32) + j);
    }
    float dp[kM][kN][4], s[kM][kN][4];
    multiply_transposed<T, D>(dp, dout_tile, row0, take(Item<0>{}));
    const T* const k_tile = take(Item<1>{});
    multiply_transposed<T, D>(s, q_tile, row0, k_tile);
    if (walk.held == TileClass::kBits) forbid(s, words, 0);
    score_gradient(s, dp, statistics + row0, scale);
    uint32_t ds[kM][kN / 2][4];
    as_left<T>(ds, s);
    multiply_add<T, D>(dq, ds, k_tile);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) dq[m][n][c] *= p.scale;
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // where no tile was visited, copies of other threads into q_tile may still be under way
  store_rows<T, D>(dq, q_tile, row0, static_cast<T*>(p.dq) + first * D, n_rows);
}

template <class T, int D>
cudaError_t launch_statistics(const AttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t grid = ceil_div(int64_t{p.B} * p.H * p.Lq * kStatisticsLanes, kAttentionThreads);
  return launch(attention_query_statistics_kernel<T, D>, dim3(static_cast<unsigned>(grid)), dim3(kAttentionThreads), 0,
                stream, p);
}

template <class T, int D>
cudaError_t launch_gradient(const AttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t grid = query_gradient_grid({p.B, p.H, p.Hkv, p.Lq, p.Lk, D});
  return launch(attention_query_gradient_kernel<T, D>, dim3(static_cast<unsigned>(grid)), dim3(kAttentionThreads),
                query_gradient_shared_bytes(D), stream, p);
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
