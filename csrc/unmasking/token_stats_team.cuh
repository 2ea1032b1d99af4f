// SPDX-License-Identifier: Apache-2.0
// The blocks that share a row in token_stats, and what their warps tell each other.
#pragma once

#include "token_stats_kernel.h"
#include "token_stats_mass.cuh"
#include "token_stats_row.cuh"

namespace diffullama::token_stats {

// What one warp found in its segment.
struct WarpRecord {
  uint64_t weight;   // sum of exp(x - top)
  uint64_t entropy;  // sum of (top - x) exp(x - top)
  uint64_t drawn;    // sum of draw weights, where they are truncated
  uint64_t kept;     // mass that can be drawn
  int first_top;     // entry of the row's largest logit, n_top times in the segment
  int n_top;
  uint32_t second;  // rank bits of the largest after it
};

struct RowShared {
  WarpRecord warps[kTokenStatsWarps];
  uint32_t top[kTokenStatsWarps], low[kTokenStatsWarps];  // rank bits
  uint64_t uniform62;
  float current;  // logit of the row's `current`, NaN where there is none
};

// A row's blocks (a cluster, or one block) with this thread's place among them.
struct Team {
  int rank, size, warps, warp, lane;

  __device__ __forceinline__ void sync() const {
    if (size > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
  // Other blocks may still read this one's shared memory.
  __device__ __forceinline__ void leave() const {
    if (size > 1) cluster_sync();
  }
  __device__ __forceinline__ int n_warps() const { return size * warps; }

  // The team's warps in the order of the row are slots: kTokenStatsWarps a block, of which `warps` are in use.
  __device__ __forceinline__ int n_slots() const { return size * kTokenStatsWarps; }
  __device__ __forceinline__ bool is_used(int slot) const {
    return slot < n_slots() && slot % kTokenStatsWarps < warps;
  }
  // A slot's entry of an array of one entry a warp.
  template <class V>
  __device__ __forceinline__ V& of_slot(V* mine, int slot) const {
    return shared_of_rank(mine, slot / kTokenStatsWarps)[slot % kTokenStatsWarps];
  }

  __device__ __forceinline__ uint32_t smallest(uint32_t* mine) const {
    uint32_t v = ~0u;
#pragma unroll 1
    for (int slot = lane; slot < n_slots(); slot += kWarp) v = is_used(slot) ? min(v, of_slot(mine, slot)) : v;
    return __reduce_min_sync(kAllLanes, v);
  }
  __device__ __forceinline__ uint32_t largest(uint32_t* mine) const {
    uint32_t v = 0;
#pragma unroll 1
    for (int slot = lane; slot < n_slots(); slot += kWarp) v = is_used(slot) ? max(v, of_slot(mine, slot)) : v;
    return __reduce_max_sync(kAllLanes, v);
  }
  __device__ __forceinline__ uint64_t total(WarpRecord* mine, uint64_t WarpRecord::* field) const {
    uint64_t v = 0;
#pragma unroll 1
    for (int slot = lane; slot < n_slots(); slot += kWarp) v += is_used(slot) ? of_slot(mine, slot).*field : 0;
    return warp_total(v);
  }
};

// A row as one thread sees it.
template <class T, bool kResident>
struct Context {
  const TokenStatsParams& p;
  Team team;
  int64_t n;  // row
  Slice<T, kResident> slice;
  LaneChunks own;
  RowShared& shared;
  uint64_t* tile_sums;  // [tiles] of this warp

  __device__ __forceinline__ int segment_begin() const { return kChunk * team.warp * p.layout.segment; }
  // Chunk of this lane in step k of a tile.
  __device__ __forceinline__ int chunk_of(int tile, int k) const { return own.first + tile * kTileChunks + k * kWarp; }
};

constexpr int kSteps = kTileChunks / kWarp;  // of a warp through a tile

// Entries by falling value, equal ones by index: smaller ranks come first.
constexpr int kIndexBits = 18;
__device__ __forceinline__ uint64_t rank_of(float x, int index) {
  return static_cast<uint64_t>(rank_bits(x)) << kIndexBits | static_cast<uint64_t>(index);
}

}  // namespace diffullama::token_stats
