// SPDX-License-Identifier: Apache-2.0
// Attention forward: a block takes a tile of queries of one head and goes through the keys.
//   warp    : 16 or 32 queries; S = Q K^T, the softmax and O += P V stay in its registers, P as the left operand of the
//             second product
//   ring    : K and V tiles in turn, copied by cp.async two or three tiles ahead; one barrier a tile
//   mask    : forbidden tiles are skipped, wholly allowed ones are not looked at, the others take their words (two
//   loads a
//             lane and tile, issued before the first product)
//   softmax : online, float32, exponents of 2; a row is rescaled only where a warp has seen a new maximum
//   bound   : tensor cores; shared memory close behind (kM = 2 halves what a product reads)
// Method: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023).
// Not yet measured on GPU.
// ptxas spills 28 B of attention_forward_kernel at D = 128 on sm_90 (4 B at 256 on sm_100): addresses of copies, stored
// before the loop and loaded again once a tile.
#include "../common/launch.h"
#include "attention_scores.cuh"

namespace diffullama {
namespace {

template <int kM>
struct RowState {
  float max[kM][2], sum[kM][2];  // of rows 16 m + 8 r + lane / 4; a lane sums its own columns

  __device__ RowState() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      max[m][0] = max[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }
};

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// Exponent of 2 to subtract: finite where the row has seen nothing yet, so that 2^(-inf - it) is 0. Rounded, so that of
// an unchanged maximum the correction is 1 and a tile without new keys changes nothing.
__device__ __forceinline__ float reference_exponent(float max, float scale) {
  return max == -INFINITY ? 0.0f : __fmul_rn(max, scale);
}

// Scores become probabilities up to the row's factor 2^-max; out and sums are brought to the new maximum.
template <int kM, int kN, int kD>
__device__ __forceinline__ void softmax_step(float (&s)[kM][kN][4], float (&out)[kM][kD][4], RowState<kM>& row,
                                             float scale) {
  float correction[kM][2];
  bool moved = false;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = row.max[m][r];
#pragma unroll
      for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
      top = quad_max(top);
      const float exponent = reference_exponent(top, scale);
      correction[m][r] = exp2_approx(__fmul_rn(row.max[m][r], scale) - exponent);
      moved |= top != row.max[m][r];
      row.max[m][r] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          s[m][n][c] = exp2_approx(fmaf(s[m][n][c], scale, -exponent));
          sum += s[m][n][c];
        }
      }
      row.sum[m][r] = fmaf(row.sum[m][r], correction[m][r], sum);
    }
  }
  if (!__any_sync(kAllLanes, moved)) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kD; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out[m][n][c] *= correction[m][c / 2];
    }
  }
}

// Divides the rows by their sums and writes their logsumexps.
template <int kM, int kD>
__device__ __forceinline__ void normalize(float (&out)[kM][kD][4], const RowState<kM>& row, float scale, float* lse,
                                          int n_rows) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(row.sum[m][r]), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int n = 0; n < kD; ++n) {
        out[m][n][2 * r] *= inverse;
        out[m][n][2 * r + 1] *= inverse;
      }
      const int i = 16 * m + 8 * r + lane_of() / 4;
      if (lane_of() % 4 == 0 && i < n_rows) {
        lse[i] = kLn2 * (reference_exponent(row.max[m][r], scale) + log2f(sum));  // log2f(0) is -inf
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocksPerSm)
    attention_forward_kernel(const __grid_constant__ AttentionParams p) {
  constexpr AttentionTile kTile = forward_tile(D);
  constexpr int kRows = kTile.rows, kColumns = kTile.columns, kStages = kTile.stages;
  constexpr int kM = kRows / (16 * kAttentionWarps), kN = kColumns / 8;
  T* const q_tile = dynamic_shared<T>();
  Ring<T, kColumns, D, kStages> ring{q_tile + kRows * D};

  // The last queries first: under a causal order they have the most keys.
  const int row_tiles = (p.Lq + kRows - 1) / kRows, head = static_cast<int>(blockIdx.x / row_tiles);
  const int b = head / p.H, h = head % p.H, q0 = (row_tiles - 1 - static_cast<int>(blockIdx.x % row_tiles)) * kRows;
  const int kv_head = h / (p.H / p.Hkv), row0 = 16 * kM * warp_of(), lane_row = q0 + row0 + lane_of() % (16 * kM);
  const SequenceMask mask{p.mask, b, p.Lq, p.Lk};
  const auto class_of = [&](int n) { return mask.tile<kRows, kColumns>(q0, n * kColumns); };
  TileWalk walk(0, (p.Lk + kColumns - 1) / kColumns, class_of), ahead = walk;

  // Items of the ring: K (kItem 0) and V (1) of each tile to visit, in turn.
  const auto issue = [&](auto item, T* tile) {
    constexpr bool kSecond = decltype(item)::value % 2 == 1;
    if (!ahead.done()) {
      const AttentionOperand& operand = kSecond ? p.v : p.k;
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
  issue(Item<0>{}, ring.at(0));
  if constexpr (kStages > 2) issue(Item<1>{}, ring.at(1));
  if constexpr (kStages > 3) issue(Item<2>{}, ring.at(2));
  static_assert(2 <= kStages && kStages <= 4);

  const float scale = log2_scale(p.scale);
  RowState<kM> row;
  float out[kM][D / 8][4] = {};
  for (; !walk.done(); walk.next()) {
    uint32_t words[kN / 4];
    if (walk.held == TileClass::kBits) {
#pragma unroll
      for (int j = 0; j < kN / 4; ++j) words[j] = mask.word(lane_row, walk.at * (kColumns / 32) + j);
    }
    float s[kM][kN][4];
    multiply_transposed<T, D>(s, q_tile, row0, take(Item<0>{}));
    if (walk.held == TileClass::kBits) forbid(s, words, 0);
    softmax_step(s, out, row, scale);
    uint32_t probabilities[kM][kN / 2][4];
    as_left<T>(probabilities, s);
    multiply_add<T, D>(out, probabilities, take(Item<1>{}));
  }

  const int n_rows = p.Lq - q0 - row0;
  const int64_t first = int64_t{head} * p.Lq + q0 + row0;
  normalize(out, row, scale, p.lse + first, n_rows);
  cp_async_wait<0>();
  __syncthreads();  // where no tile was visited, copies of other threads into q_tile may still be under way
  store_rows<T, D>(out, q_tile, row0, static_cast<T*>(p.out) + first * D, n_rows);
}

template <class T, int D>
cudaError_t launch_forward(const AttentionParams& p, cudaStream_t stream) {
  const int64_t grid = forward_grid({p.B, p.H, p.Hkv, p.Lq, p.Lk, D});
  return launch(attention_forward_kernel<T, D>, dim3(static_cast<unsigned>(grid)), dim3(kAttentionThreads),
                forward_shared_bytes(D), stream, p);
}

}  // namespace

cudaError_t launch_attention(const AttentionParams& p, int D, bool is_half, cudaStream_t stream) {
  return with_attention_type(D, is_half, [&](auto type, auto width) {
    return launch_forward<typename decltype(type)::type, decltype(width)::value>(p, stream);
  });
}

}  // namespace diffullama
