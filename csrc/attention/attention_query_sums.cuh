// SPDX-License-Identifier: Apache-2.0
// dQ while it is being summed: float32 in global memory, zeros at first, to which the blocks of all key tiles add;
// device only.
//
// Sums are [B * H, ceil(Lq / 64), D / 8, 4, 128]: by tiles of 64 queries, columns of 8 and bands of 16 queries,
// fragments of 16 x 8. A fragment is what a warp of mma m16n8k16, and of wgmma m64 (four warps, a band each), holds in
// four accumulators: lane 4 g + q has elements (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). So a warp adds to
// 512 contiguous bytes at once. From sm_90 on a lane's four lie together, for one vector reduction; below, each of the
// four is 32 floats in a row, for four. The buffer never leaves the device that fills it, so both are one format.
#pragma once

#include "../common/simt.cuh"
#include "attention_plan.h"

namespace diffullama {

constexpr int kFragment = 128;  // floats

// The fragments of queries [64 i, 64 i + 64) of a head; q0 is any of them.
template <int D>
__device__ __forceinline__ float* sums_tile(float* sums, int64_t head, int Lq, int q0) {
  const int tiles = (Lq + kSumsRows - 1) / kSumsRows;
  return sums + (head * tiles + q0 / kSumsRows) * (kSumsRows * D);
}

// Of queries [16 band, 16 band + 16) and columns [8 n, 8 n + 8) of a tile.
__device__ __forceinline__ float* sums_fragment(float* tile, int band, int n) {
  return tile + (n * (kSumsRows / 16) + band) * kFragment;
}

#if defined(DIFFULLAMA_SIMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
__device__ __forceinline__ void add_fragment(float* fragment, const float (&c)[4]) {
  reduce_add(fragment + 4 * (threadIdx.x % kWarp), make_float4(c[0], c[1], c[2], c[3]));
}
__device__ __forceinline__ float4 read_fragment(const float* fragment) {
  return __ldg(reinterpret_cast<const float4*>(fragment) + threadIdx.x % kWarp);
}
#else
__device__ __forceinline__ void add_fragment(float* fragment, const float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) reduce_add(fragment + kWarp * i + threadIdx.x % kWarp, c[i]);
}
__device__ __forceinline__ float4 read_fragment(const float* fragment) {
  const float* const from = fragment + threadIdx.x % kWarp;
  return make_float4(__ldg(from), __ldg(from + kWarp), __ldg(from + 2 * kWarp), __ldg(from + 3 * kWarp));
}
#endif

// Makes the additions to each tile of queries happen in the order of the key tiles. A block takes the tile of keys that
// its ticket says, so that all earlier ones are under way or done, and before it adds waits until as many key tiles
// have added as come before it and visit these queries:
//
//   one warp:    turn = QueryTurns::turn(key_tile, visits)
//   one thread:  turns.wait(query_tile, turn)
//   a barrier;   all add, then __threadfence(); a barrier
//   one thread:  turns.pass(query_tile, turn)
//
// Warps that add to fragments of their own can take such turns one by one, without barriers.
// Blocks must go through the tiles of queries in the same order, or two could wait for each other.
struct QueryTurns {
  int* counters;  // the next ticket, then how many have added, by tile of queries; zeros at launch

  __device__ __forceinline__ int ticket() const { return atomicAdd(counters, 1); }  // by one thread

  // How many of the key tiles before this one visit, if visits(i) says so of tile i.
  template <class Visits>
  static __device__ __forceinline__ int turn(int key_tile, Visits visits) {
    int n = 0;
    for (int first = 0; first < key_tile; first += kWarp) {
      const int i = first + static_cast<int>(threadIdx.x % kWarp);
      n += __popc(__ballot_sync(kAllLanes, i < key_tile && visits(i)));
    }
    return n;
  }

  __device__ __forceinline__ void wait(int64_t query_tile, int turn) const {
    while (load_acquire(counters + 1 + query_tile) != turn) {
    }
  }
  __device__ __forceinline__ void pass(int64_t query_tile, int turn) const {
    store_release(counters + 1 + query_tile, turn + 1);
  }
};

}  // namespace diffullama
