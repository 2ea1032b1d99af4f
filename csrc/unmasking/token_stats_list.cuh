// SPDX-License-Identifier: Apache-2.0
// The entries of a warp's segment whose logits lie in an interval: found 32 at a time, and remembered for later passes.
#pragma once

#include "../common/cuda_block.cuh"
#include "token_stats_team.cuh"

namespace diffullama::token_stats {

// Which entries of a lane's chunk lie in [lo, hi]: bit i / 2 + 16 * (i % 2) for entry i.
template <class T>
__device__ __forceinline__ uint32_t entries_within(const Chunk<T>& chunk, float lo, float hi) {
  uint32_t found = 0;
  if constexpr (std::is_same_v<T, float>) {
    float x[kChunk];
    unpack(chunk, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) found |= x[i] >= lo && x[i] <= hi ? 1u << (i / 2 + 16 * (i % 2)) : 0u;
  } else {
    const T low = static_cast<T>(lo), high = static_cast<T>(hi);
    const Pair<T> lows{low, low}, highs{high, high};
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const Pair<T> pair = pair_of(chunk, i);
      found |= __hge2_mask(pair, lows) & __hle2_mask(pair, highs) & (0x00010001u << i);
    }
  }
  return found;
}

// The same for the lane's four chunks of a tile, step k at bits 4 * k and 16 + 4 * k.
template <class T, bool kResident>
__device__ __forceinline__ uint32_t tile_within(const Context<T, kResident>& c, int tile, float lo, float hi) {
  uint32_t found = 0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int chunk = c.chunk_of(tile, k);
    if (chunk < c.own.end) found |= entries_within(c.slice.chunk(chunk), lo, hi) << (4 * k);
  }
  return found;
}

// Takes the lowest entry out of tile_within's bits: its place in the warp's segment.
__device__ __forceinline__ int take_entry(uint32_t& found, int tile, int lane) {
  const int bit = __ffs(static_cast<int>(found)) - 1;
  found &= found - 1;
  const int step = bit / 4 % 4, entry = 2 * (bit % 4) + bit / 16;
  return kChunk * (tile * kTileChunks + step * kWarp + lane) + entry;
}

// What a warp remembers of the entries in [lo, hi], tile by tile; complete if there are at most kListed.
struct EntryList {
  uint16_t* places;  // [kListed] in the segment
  int* ends;         // [tiles] how many up to the end of the tile
  int n;

  template <class T, bool kResident>
  __device__ void fill(const Context<T, kResident>& c, float lo, float hi) {
    n = 0;
    for (int tile = 0; tile < c.p.layout.tiles; ++tile) {
      uint32_t found = tile_within(c, tile, lo, hi);
      const int mine = __popc(found), upto = warp_inclusive_scan(mine);
      for (int slot = n + upto - mine; found != 0; ++slot) {
        const int place = take_entry(found, tile, c.team.lane);
        if (slot < kListed) places[slot] = static_cast<uint16_t>(place);
      }
      n += __shfl_sync(kAllLanes, upto, kWarp - 1);
      if (c.team.lane == 0) ends[tile] = n;
    }
    __syncwarp();
  }
  __device__ __forceinline__ bool is_complete() const { return n <= kListed; }
};

}  // namespace diffullama::token_stats
