// SPDX-License-Identifier: Apache-2.0
// How the producer and the consumers of the sm_90a attention kernels meet.
#pragma once

#include "../common/hopper.cuh"
#include "attention_scores.cuh"

namespace diffullama {

// A tile of keys for the consumers; after the last one of a tile of queries comes kEnd, after the last queries kStop.
struct KeyTile {
  static constexpr int kEnd = -1, kStop = -2;

  int tile;
  uint32_t classes;  // two bits a consumer: TileClass of its queries
  int queries;       // number of the tile of queries

  __device__ TileClass of(int group) const { return static_cast<TileClass>(classes >> 2 * group & 3u); }
};

// Slot and parity of a ring's next use. One register.
template <int kStages>
struct RingPlace {
  static_assert((kStages & (kStages - 1)) == 0);
  uint32_t uses = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(uses % kStages); }
  __device__ __forceinline__ int parity() const { return static_cast<int>(uses / kStages % 2); }
  __device__ __forceinline__ void advance() { ++uses; }
};

// One arrival a warp, when all its lanes are done with what the barrier guards.
__device__ __forceinline__ void release(Mbarrier& barrier) {
  __syncwarp();
  if (lane_of() == 0) mbarrier_arrive(barrier);
}

// Turns at issuing products go round the consumers; whoever is next waits at its barrier.
template <int kGroups>
struct Turns {
  static constexpr int kFirstBarrier = 1, kThreads = 2 * kWarpgroup;

  int group;

  __device__ explicit Turns(int group) : group(group) {
    if (group == kGroups - 1) pass();
  }
  __device__ __forceinline__ void wait() const { barrier_sync(kFirstBarrier + group, kThreads); }
  __device__ __forceinline__ void pass() const {
    barrier_arrive(kFirstBarrier + (group + 1 == kGroups ? 0 : group + 1), kThreads);
  }
};

}  // namespace diffullama
