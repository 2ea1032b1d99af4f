// SPDX-License-Identifier: Apache-2.0
// What the warpgroups of attention_hopper_backward_kernel share: parameters, shared memory, barriers, and the products.
#pragma once

#include "attention_hopper_mask.cuh"
#include "attention_hopper_pipeline.cuh"
#include "attention_hopper_plan.h"
#include "attention_hopper_softmax.cuh"
#include "attention_query_sums.cuh"

namespace diffullama {

struct HopperBackwardParams {
  CUtensorMap q, k, v, dout;
  MaskFragments fragments;  // of the transpose
  AttentionMaskParams mask;
  int B, H, Hkv, Lq, Lk;
  float scale;
  const QueryStatistics* statistics;  // [B, H, whole tiles of queries]
  float* sums;
  QueryTurns turns;
  void *dk, *dv;
};

// A tile of queries of one head, for the consumers; after the last one of a tile of keys comes kEnd.
struct QueryItem {
  static constexpr int kEnd = -1;

  int tile, head;    // the head of all B * H
  uint32_t classes;  // two bits a consumer: TileClass of its keys
  int turn;          // at adding to the sums, in the kernel that is deterministic

  __device__ TileClass of(int group) const { return static_cast<TileClass>(classes >> 2 * group & 3u); }
};

// The tile of keys of one head that a ticket stands for: all tiles of a head, then the next head.
struct KeyTicket {
  int b, kv_head, tile;  // the head of the sequence's

  __device__ KeyTicket(const HopperBackwardParams& p, int ticket) {
    const int n_tiles = key_tiles(p), head = ticket / n_tiles;
    b = head / p.Hkv;
    kv_head = head % p.Hkv;
    tile = ticket % n_tiles;
  }
  static __device__ __forceinline__ int key_tiles(const HopperBackwardParams& p) {
    return (p.Lk + kHopperKeys - 1) / kHopperKeys;
  }
};

template <int D>
struct BackwardPipeline {
  static constexpr HopperBackwardTile kTile = hopper_backward_tile(D);
  static constexpr int kNone = -1;

  Mbarrier k_full, v_full, keys_empty, q_full[kTile.stages], dout_full[kTile.stages], empty[kTile.stages], ds_full;
  QueryItem item[kTile.stages];  // comes and goes with Q
  int ticket;                    // comes and goes with K; kNone when there are no more

  __device__ void init() {
    constexpr int kConsumerWarps = 4 * kHopperBackwardGroups;
    mbarrier_init(k_full, 1);
    mbarrier_init(v_full, 1);
    mbarrier_init(keys_empty, kConsumerWarps);
    mbarrier_init(ds_full, kConsumerWarps);
    for (int i = 0; i < kTile.stages; ++i) {
      mbarrier_init(q_full[i], 1);
      mbarrier_init(dout_full[i], 1);
      mbarrier_init(empty[i], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
};

// Panels of 64 columns.
template <class T, int D>
struct BackwardTiles {
  static constexpr HopperBackwardTile kTile = hopper_backward_tile(D);
  static constexpr int kPanels = D / kPanel, kQueries = kTile.queries, kHalves = kQueries / kPanel;

  T k[kPanels][kHopperKeys][kPanel], v[kPanels][kHopperKeys][kPanel];
  T q[kTile.stages][kPanels][kQueries][kPanel], dout[kTile.stages][kPanels][kQueries][kPanel];
  T ds[2][kHalves][kHopperKeys][kPanel];  // transposed: columns are queries
  QueryStatistics statistics[kTile.stages][kQueries];
};

// The five products of a consumer, 64 keys each; of dQ it makes 64 queries by 64 columns.
template <class T, int D>
struct BackwardProducts {
  using Tiles = BackwardTiles<T, D>;
  static constexpr int kQueries = Tiles::kQueries, kHalves = Tiles::kHalves;
  static constexpr int kRow = kPanel * 2, kQueryPanel = kQueries * kRow, kKeyPanel = kHopperKeys * kRow;
  static constexpr int kStage = Tiles::kPanels * kQueryPanel;

  uint64_t k, v, q, dout;             // as products over D
  uint64_t queries, douts, ds, keys;  // as products over queries, and over keys

  __device__ BackwardProducts(const Tiles& tiles, int group)
      : k(matrix_descriptor(&tiles.k[0][64 * group])),
        v(matrix_descriptor(&tiles.v[0][64 * group])),
        q(matrix_descriptor(&tiles.q[0])),
        dout(matrix_descriptor(&tiles.dout[0])),
        queries(matrix_descriptor(&tiles.q[0], kQueryPanel)),
        douts(matrix_descriptor(&tiles.dout[0], kQueryPanel)),
        ds(matrix_descriptor(&tiles.ds[0][D == 64 ? group : 0])),
        keys(matrix_descriptor(&tiles.k[D == 64 ? 0 : group])) {}

  // s = K Q^T
  __device__ __forceinline__ void scores(float (&s)[kQueries / 8][4], int stage) const { over_width(s, k, q, stage); }
  // dp = V dO^T
  __device__ __forceinline__ void probability_gradients(float (&dp)[kQueries / 8][4], int stage) const {
    over_width(dp, v, dout, stage);
  }
  // dv += P^T dO for the queries [64 half, 64 half + 64)
  __device__ __forceinline__ void value_gradients(float (&dv)[D / 8][4], const uint32_t (&p)[4][4], int stage,
                                                  int half) const {
    over_queries(dv, p, douts, stage, half);
  }
  // dk += dS^T Q
  __device__ __forceinline__ void key_gradients(float (&dk)[D / 8][4], const uint32_t (&ds)[4][4], int stage,
                                                int half) const {
    over_queries(dk, ds, queries, stage, half);
  }
  // dq = dS K
  __device__ __forceinline__ void query_gradients(float (&dq)[8][4], int buffer) const {
    const uint64_t left = matrix_after(ds, buffer * kHalves * kKeyPanel);
#pragma unroll
    for (int i = 0; i < kHopperKeys / 16; ++i) {
      wgmma<T, true, true>(dq, matrix_after(left, i * 16 * kRow), matrix_after(keys, i * 16 * kRow), i > 0);
    }
  }

 private:
  __device__ __forceinline__ void over_width(float (&s)[kQueries / 8][4], uint64_t left, uint64_t right,
                                             int stage) const {
    const uint64_t of_stage = matrix_after(right, stage * kStage);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int panel = i / 4, in_row = i % 4 * 32;
      wgmma<T, false>(s, matrix_after(left, panel * kKeyPanel + in_row),
                      matrix_after(of_stage, panel * kQueryPanel + in_row), i > 0);
    }
  }
  __device__ __forceinline__ void over_queries(float (&d)[D / 8][4], const uint32_t (&left)[4][4], uint64_t right,
                                               int stage, int half) const {
    const uint64_t of_stage = matrix_after(right, stage * kStage + half * 64 * kRow);
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma<T, true>(d, left[i], matrix_after(of_stage, i * 16 * kRow), true);
  }
};

}  // namespace diffullama
