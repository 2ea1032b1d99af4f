// SPDX-License-Identifier: Apache-2.0
// Attention backward, all products. A block takes a tile of keys of one head of keys and goes through the queries of
// all heads that share it, so that dK and dV of grouped heads need neither atomics nor a sum afterwards.
//   warp : 16 or 32 keys; dP^T = V dO^T, S^T = K Q^T, dK += dS^T Q and dV += P^T dO, where P^T and dS^T go from
//          accumulators to left operands in its registers
//   dQ   : dS K, over the keys of all warps: dS^T goes through shared memory, a warp takes some queries and columns,
//   and
//          adds to the float32 sums in global memory, to which the blocks of all key tiles add
//   mask : words are rows of queries; a warp transposes them as 32 x 32 bits, and then all is as in the forward
//   ring : tiles of dO and Q in turn. A step has two barriers: where its second item has arrived (both, if the ring
//   holds
//          two), and where dS^T is written and both items are used up
// At D = 256 one launch makes dK and dQ and another dV: together their accumulators are more than a thread's registers;
// and dS^T goes through shared memory in two parts, for which two barriers more.
// Bound: tensor cores and reads of shared memory. Method: Dao, "FlashAttention-2" (2023).
// Not yet measured on GPU.
// ptxas spills at most 32 B of attention_key_gradient_kernel (docs/kernels/attention.md): it needs every register.
#include "../common/launch.h"
#include "attention_query_sums.cuh"
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

// Queries [16 part, 16 part + 16 kParts) of dS^T [16 kM keys, queries] to the warp's rows of a tile of that many
// columns.
template <class T, int kParts, int kM, int kK>
__device__ __forceinline__ void store_score_gradients(T* tile, int row0, const uint32_t (&ds)[kM][kK][4], int part) {
  const int g = lane_of() / 4, pair = lane_of() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T* const to = tile + swizzled<16 * kParts>(row0 + 16 * m + i % 2 * 8 + g, 2 * k + i / 2) + 2 * pair;
        memcpy(to, &ds[m][part + k][i], sizeof(uint32_t));
      }
    }
  }
}

// The part of dS K that a warp makes, for kQueries queries: kM bands of 16 and kN columns of 8.
template <int kQueries, int D>
struct QueryShare {
  static constexpr int kDown = kQueries < 32 ? 1 : 2, kAcross = kAttentionWarps / kDown;
  static constexpr int kM = kQueries / (16 * kDown), kN = D / (8 * kAcross);
  static_assert(kM * 16 * kDown == kQueries && kN % 2 == 0 && kN * 8 * kAcross == D, "all warps do as much");

  __device__ static __forceinline__ int band() { return unknown(warp_of()) % kDown * kM; }
  __device__ static __forceinline__ int column() { return unknown(warp_of()) / kDown * kN; }
};

// Adds dS K, for dS^T [kRows, kQueries] and K [kRows, D] in shared memory, to the bands of a tile of sums from `band`
// on, after wait().
template <class T, int D, int kRows, int kQueries, class Wait>
__device__ __forceinline__ void add_query_gradient(float* sums, int band, const T* ds_tile, const T* k_tile,
                                                   Wait&& wait) {
  using Share = QueryShare<kQueries, D>;
  constexpr int kM = Share::kM, kN = Share::kN;
  const int first_band = Share::band(), first_column = Share::column();
  float dq[kM][kN][4] = {};
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_left_transposed<kQueries>(a[m], ds_tile, first_band + m, k);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t b[4];
      load_right<D>(b, k_tile, k, first_column / 2 + n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(dq[m][2 * n], a[m], {b[0], b[1]});
        mma_m16n8k16<T>(dq[m][2 * n + 1], a[m], {b[2], b[3]});
      }
    }
  }
  wait();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      add_fragment(sums_fragment(sums, band + first_band + m, first_column + n), dq[m][n]);
    }
  }
}

// The block's additions to one tile of queries, in turn where there are turns.
template <class Visits>
struct Turn {
  QueryTurns turns;
  int64_t query_tile;
  int key_tile, number = 0;  // known to the first warp
  Visits visits;

  __device__ __forceinline__ Turn(int* turns, int64_t query_tile, int key_tile, Visits visits)
      : turns{turns}, query_tile(query_tile), key_tile(key_tile), visits(visits) {}

  __device__ __forceinline__ void wait() {
    if (turns.counters == nullptr) return;
    if (warp_of() == 0) {
      number = QueryTurns::turn(key_tile, visits);
      if (lane_of() == 0) turns.wait(query_tile, number);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void pass() const {
    if (turns.counters == nullptr) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) turns.pass(query_tile, number);
  }
};

struct BlockNumber {
  int value;
};

// By which a block finds its work: in turns the order in which blocks started.
__device__ __forceinline__ int block_number(int* turns) {
  if (turns == nullptr) return static_cast<int>(blockIdx.x);
  BlockNumber& number = static_shared<BlockNumber>();
  if (threadIdx.x == 0) number.value = QueryTurns{turns}.ticket();
  __syncthreads();
  return number.value;
}

template <class T, int D, bool kDk, bool kDv>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocksPerSm)
    attention_key_gradient_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr AttentionTile kTile = key_gradient_tile(D);
  constexpr int kRows = kTile.rows, kColumns = kTile.columns, kStages = kTile.stages;
  constexpr int kM = kRows / (16 * kAttentionWarps), kN = kColumns / 8, kExchange = key_gradient_exchange(D);
  T* const k_tile = dynamic_shared<T>();
  T* const v_tile = k_tile + kRows * D;
  T* const ds_tile = v_tile + kRows * D;  // [kRows, kExchange]
  Ring<T, kColumns, D, kStages> ring{ds_tile + kRows * kExchange};
  QueryStatistics* const statistics = reinterpret_cast<QueryStatistics*>(ring.at(kStages));

  const int number = kDk ? block_number(p.turns) : static_cast<int>(blockIdx.x);
  const int row_tiles = (p.Lk + kRows - 1) / kRows, kv_head = number / row_tiles;
  const int b = kv_head / p.Hkv, hkv = kv_head % p.Hkv, k0 = number % row_tiles * kRows;
  const int group = p.H / p.Hkv, row0 = 16 * kM * warp_of(), query_tiles = (p.Lq + kColumns - 1) / kColumns;
  const SequenceMask mask{p.mask, b, p.Lq, p.Lk};
  // Tiles of queries, head by head.
  const auto class_of = [&](int i) { return mask.tile<kColumns, kRows>(i % query_tiles * kColumns, k0); };
  TileWalk walk(0, group * query_tiles, class_of), ahead = walk;

  // Items of the ring, numbered from those of the tile at hand: dO (even) and Q (odd) of each tile to visit; only for
  // dV the other way round, as they are used. The statistics come with the first, for tiles of this parity.
  int parity = 0;  // of the tile at hand
  const auto issue = [&](auto item) {
    constexpr int kItem = decltype(item)::value;
    constexpr bool kSecond = kItem % 2 == 1;
    if (!ahead.done()) {
      const int head = hkv * group + ahead.at / query_tiles, q0 = ahead.at % query_tiles * kColumns;
      const AttentionOperand& operand = kSecond == kDk ? p.q : p.dout;
      load_tile<kColumns, D>(ring.ahead(kItem), row_of<T>(operand, b, head, q0), operand.row, p.Lq - q0);
      const int i = static_cast<int>(threadIdx.x), n_left = p.Lq - q0;
      if (!kSecond && i < kColumns) {  // zeros past the last query: P is 1 there, dO and so dP are 0
        const QueryStatistics* const of_head = p.statistics + (int64_t{b} * p.H + head) * p.Lq + q0;
        QueryStatistics* const to = statistics + (parity ^ kItem / 2 % 2) * kColumns + i;
        cp_async<8>(to, of_head + (i < n_left ? i : 0), i < n_left ? 8 : 0);
      }
      if (kSecond) ahead.next();
    }
    cp_async_commit();
  };
  // Until all but the last kLeft items issued have arrived, and all threads are here.
  const auto arrive = [](auto left) {
    cp_async_wait<decltype(left)::value>();
    __syncthreads();
  };
  constexpr bool kHoldsTwo = kDk && kDv;  // the first item is used, like the second, until dK and dV are made
  constexpr bool kBothAtOnce = kHoldsTwo && kStages == 2;
  constexpr int kLeft = kHoldsTwo && !kBothAtOnce ? kStages - 3 : 0;  // when the next tile's first has to be there
  static_assert(2 <= kStages && kStages <= 4 && (kHoldsTwo || kStages == 2));

  load_tile<kRows, D>(k_tile, row_of<T>(p.k, b, hkv, k0), p.k.row, p.Lk - k0);
  if constexpr (kDk) load_tile<kRows, D>(v_tile, row_of<T>(p.v, b, hkv, k0), p.v.row, p.Lk - k0);
  issue(Item<0>{});
  issue(Item<1>{});
  if constexpr (kStages > 2) issue(Item<2>{});
  if constexpr (kStages > 3) issue(Item<3>{});
  if constexpr (!kBothAtOnce) arrive(Item<kStages - 1>{});

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
    const T *const first = ring.ahead(0), *const second = ring.ahead(1);
    float dp[kM][kN][4] = {}, s[kM][kN][4];
    if constexpr (kBothAtOnce) arrive(Item<0>{});
    if constexpr (kDk) {
      multiply_transposed<T, D>(dp, v_tile, row0, first);
    } else {
      multiply_transposed<T, D>(s, k_tile, row0, first);
    }
    if constexpr (!kBothAtOnce) arrive(Item<kStages - 2>{});
    if constexpr (!kHoldsTwo) issue(Item<2>{});
    if constexpr (kDk) multiply_transposed<T, D>(s, k_tile, row0, second);
    if (walk.held == TileClass::kBits) {
#pragma unroll
      for (int j = 0; j < kColumns / 32; ++j) words[j] = transpose_in_warp(words[j]);
      forbid(s, words, row0 % 32);
    }
    gradients_of_scores(s, dp, statistics + parity * kColumns, scale);
    uint32_t left[kM][kN / 2][4], ds[kM][kN / 2][4];
    if constexpr (kDk) {
      as_left<T>(ds, dp);
      store_score_gradients<T, kExchange / 16>(ds_tile, row0, ds, 0);
      multiply_add<T, D>(dk, ds, second);
    }
    if constexpr (kDv) {
      as_left<T>(left, s);
      multiply_add<T, D>(dv, left, kDk ? first : second);
    }
    // Both items are used up, dS^T is written, the first item of the next tile is there.
    arrive(Item<kLeft>{});
    if constexpr (kHoldsTwo) issue(Item<kStages>{});
    issue(Item<kHoldsTwo ? kStages + 1 : 3>{});
    if constexpr (kDk) {
      const int query_tile = walk.at % query_tiles;
      const int64_t head = int64_t{b} * p.H + hkv * group + walk.at / query_tiles;
      const auto visits = [&](int i) {
        return mask.tile<kColumns, kRows>(query_tile * kColumns, i * kRows) != TileClass::kNothing;
      };
      Turn turn(p.turns, head * query_tiles + query_tile, k0 / kRows, visits);
      float* const sums = sums_tile<D>(p.query_sums, head, p.Lq, query_tile * kColumns);
      const int band = query_tile * kColumns % kSumsRows / 16;
      add_query_gradient<T, D, kRows, kExchange>(sums, band, ds_tile, k_tile, [&] { turn.wait(); });
#pragma unroll
      for (int part = 1; part < kColumns / kExchange; ++part) {
        __syncthreads();
        store_score_gradients<T, kExchange / 16>(ds_tile, row0, ds, part * (kExchange / 16));
        __syncthreads();
        add_query_gradient<T, D, kRows, kExchange>(sums, band + part * (kExchange / 16), ds_tile, k_tile, [] {});
      }
      turn.pass();
    }
    ring.advance(2);
    parity ^= 1;
  }

  cp_async_wait<0>();
  __syncthreads();  // dQ of other warps, and where no tile was visited copies of other threads, still need the tiles
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
