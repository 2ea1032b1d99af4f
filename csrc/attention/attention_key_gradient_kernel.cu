// SPDX-License-Identifier: Apache-2.0
// Attention backward, second half: dK and dV. A block takes a tile of keys of one head of keys and goes through the
// queries of all heads that share it, so that grouped heads need neither atomics nor a sum afterwards.
//   warp : 16 or 32 keys; dP^T = V dO^T, S^T = K Q^T, dK += dS^T Q and dV += P^T dO, where P^T and dS^T go from
//   accumulators to
//          left operands in its registers
//   mask : words are rows of queries; a warp transposes them as 32 x 32 bits, and then all is as in the forward
//   ring : tiles of dO and Q in turn. Both are needed to the end of a step, so it refills at the step's start
// At D = 256 one launch makes dK and another dV: together their accumulators are more than a thread's registers.
// Not yet measured on GPU.
// ptxas spills at most 32 B of attention_key_gradient_kernel, at D = 64, 128 (sm_80) and 256: it needs every register.
#include "../common/launch.h"
#include "attention_scores.cuh"

namespace diffullama {
namespace {

// Scores and dP, both transposed, become P^T and dS^T, given the statistics of the tile's queries.
template <int kM, int kN>
__device__ __forceinline__ void gradients_of_scores(float (&s)[kM][kN][4], float (&dp)[kM][kN][4],
                                                    const QueryStatistics* queries, float scale) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    // Two neighbouring queries: {logsumexp, sum dO * O} of each.
    const float4 two = *reinterpret_cast<const float4*>(queries + 8 * n + 2 * (lane_of() % 4));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[m][n][c] = exp2_approx(fmaf(s[m][n][c], scale, c % 2 ? -two.z : -two.x));
        dp[m][n][c] = s[m][n][c] * (dp[m][n][c] - (c % 2 ? two.w : two.y));
      }
    }
  }
}

template <class T, int D, bool kDk, bool kDv>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocksPerSm)
    attention_key_gradient_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr AttentionTile kTile = key_gradient_tile(D);
  constexpr int kRows = kTile.rows, kColumns = kTile.columns, kStages = kTile.stages;
  constexpr int kM = kRows / (16 * kAttentionWarps), kN = kColumns / 8;
  T* const k_tile = dynamic_shared<T>();
  T* const v_tile = k_tile + kRows * D;
  Ring<T, kColumns, D, kStages> ring{v_tile + kRows * D};
  QueryStatistics* const statistics = reinterpret_cast<QueryStatistics*>(ring.at(kStages));

  const int row_tiles = (p.Lk + kRows - 1) / kRows, kv_head = static_cast<int>(blockIdx.x / row_tiles);
  const int b = kv_head / p.Hkv, hkv = kv_head % p.Hkv, k0 = static_cast<int>(blockIdx.x % row_tiles) * kRows;
  const int group = p.H / p.Hkv, row0 = 16 * kM * warp_of(), query_tiles = (p.Lq + kColumns - 1) / kColumns;
  const SequenceMask mask{p.mask, b, p.Lq, p.Lk};
  // Tiles of queries, head by head.
  const auto class_of = [&](int i) { return mask.tile<kColumns, kRows>(i % query_tiles * kColumns, k0); };
  TileWalk walk(0, group * query_tiles, class_of), ahead = walk;

  // Items of the ring: dO (kItem 0) and Q (1) of each tile to visit, in turn; only for dV the other way round, as they
  // are used. The statistics come with the first, for the tile of this parity.
  const auto issue = [&](auto item, T* tile, int parity) {
    constexpr bool kSecond = decltype(item)::value % 2 == 1;
    if (!ahead.done()) {
      const int head = hkv * group + ahead.at / query_tiles, q0 = ahead.at % query_tiles * kColumns;
      const AttentionOperand& operand = kSecond == kDk ? p.q : p.dout;
      load_tile<kColumns, D>(tile, row_of<T>(operand, b, head, q0), operand.row, p.Lq - q0);
      const int i = static_cast<int>(threadIdx.x), n_left = p.Lq - q0;
      if (!kSecond && i < kColumns) {  // zeros past the last query: P is 1 there, dO and so dP are 0
        const QueryStatistics* const of_head = p.statistics + (int64_t{b} * p.H + head) * p.Lq + q0;
        cp_async<8>(statistics + parity * kColumns + i, of_head + (i < n_left ? i : 0), i < n_left ? 8 : 0);
      }
      if (kSecond) ahead.next();
    }
    cp_async_commit();
  };
  constexpr bool kHoldsTwo = kDk && kDv;                         // both items of a tile are used to the end of its step
  constexpr int kAhead = kHoldsTwo ? kStages - 2 : kStages - 1;  // items issued before the first is waited for
  static_assert(1 <= kAhead && kAhead <= 2, "a step that holds two items needs a third buffer");
  int parity = 0;  // of the tile at hand
  // The first item of a tile, when all of the tile before is used up.
  const auto take_first = [&] {
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    if constexpr (kHoldsTwo) issue(Item<kAhead>{}, ring.behind(2), parity ^ 1);
    issue(Item<kAhead + (kHoldsTwo ? 1 : 0)>{}, ring.behind(1), parity ^ 1);
    return ring.use();
  };
  // The second. If the first is used up by now, its buffer is filled again.
  const auto take_second = [&] {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if constexpr (!kHoldsTwo) issue(Item<1 + kAhead>{}, ring.behind(1), parity ^ 1);
    return ring.use();
  };

  load_tile<kRows, D>(k_tile, row_of<T>(p.k, b, hkv, k0), p.k.row, p.Lk - k0);
  if constexpr (kDk) load_tile<kRows, D>(v_tile, row_of<T>(p.v, b, hkv, k0), p.v.row, p.Lk - k0);
  issue(Item<0>{}, ring.at(0), 0);
  if constexpr (kAhead > 1) issue(Item<1>{}, ring.at(1), 0);

  const float scale = log2_scale(p.scale);
  float dk[kDk ? kM : 1][D / 8][4] = {}, dv[kDv ? kM : 1][D / 8][4] = {};
  for (; !walk.done(); walk.next()) {
    uint32_t words[kColumns / 32];  // of the lane's queries and the 32 keys that hold the warp's
    if (walk.held == TileClass::kBits) {
#pragma unroll
      for (int j = 0; j < kColumns / 32; ++j) {
        words[j] = mask.word(walk.at % query_tiles * kColumns + 32 * j + lane_of(), (k0 + row0) / 32);
      }
    }
    const QueryStatistics* const queries = statistics + parity * kColumns;
    float dp[kM][kN][4] = {}, s[kM][kN][4];
    const T *dout_tile = nullptr, *q_tile = nullptr;
    if constexpr (kDk) {
      dout_tile = take_first();
      multiply_transposed<T, D>(dp, v_tile, row0, dout_tile);
      q_tile = take_second();
    } else {
      q_tile = take_first();
    }
    multiply_transposed<T, D>(s, k_tile, row0, q_tile);
    if (walk.held == TileClass::kBits) {
#pragma unroll
      for (int j = 0; j < kColumns / 32; ++j) words[j] = transpose_in_warp(words[j]);
      forbid(s, words, row0 % 32);
    }
    gradients_of_scores(s, dp, queries, scale);
    uint32_t left[kM][kN / 2][4];
    if constexpr (kDk) {
      as_left<T>(left, dp);
      multiply_add<T, D>(dk, left, q_tile);
    }
    if constexpr (kDv) {
      as_left<T>(left, s);
      if constexpr (!kDk) dout_tile = take_second();
      multiply_add<T, D>(dv, left, dout_tile);
    }
    parity ^= 1;
  }

  cp_async_wait<0>();
  __syncthreads();  // where no tile was visited, copies of other threads into k_tile and v_tile may still be under way
  const int n_rows = p.Lk - k0 - row0;
  const int64_t first = (int64_t{kv_head} * p.Lk + k0 + row0) * D;
  if constexpr (kDk) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) dk[m][n][c] *= p.scale;
      }
    }
    store_rows<T, D>(dk, k_tile, row0, static_cast<T*>(p.dk) + first, n_rows);
  }
  if constexpr (kDv) store_rows<T, D>(dv, v_tile, row0, static_cast<T*>(p.dv) + first, n_rows);
}

template <class T, int D, bool kDk, bool kDv>
cudaError_t launch_gradient(const AttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t grid = key_gradient_grid({p.B, p.H, p.Hkv, p.Lq, p.Lk, D});
  return launch(attention_key_gradient_kernel<T, D, kDk, kDv>, dim3(static_cast<unsigned>(grid)),
                dim3(kAttentionThreads), key_gradient_shared_bytes(D), stream, p);
}

}  // namespace

cudaError_t launch_key_gradient(const AttentionBackwardParams& p, int D, bool is_half, cudaStream_t stream) {
  return with_attention_type(D, is_half, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kD = decltype(width)::value;
    if constexpr (key_gradients_together(kD)) {
      return launch_gradient<T, kD, true, true>(p, stream);
    } else {
      const cudaError_t error = launch_gradient<T, kD, true, false>(p, stream);
      return error == cudaSuccess ? launch_gradient<T, kD, false, true>(p, stream) : error;
    }
  });
}

}  // namespace diffullama
