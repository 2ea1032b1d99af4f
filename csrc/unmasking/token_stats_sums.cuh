// SPDX-License-Identifier: Apache-2.0
// What token_stats learns of a warp's segment by going through it: the largest logits, and the sums behind
// probabilities, entropy and the draw.
#pragma once

#include <climits>

#include "../common/cuda_block.cuh"
#include "token_stats_team.cuh"

namespace diffullama::token_stats {

// Rank bits of the largest of the lane's entries.
template <class T, bool kResident>
__device__ uint32_t lane_largest(const Context<T, kResident>& c) {
  Largest<T> largest;
  for (int chunk = c.own.first; chunk < c.own.end; chunk += kWarp) largest.add(c.slice.chunk(chunk));
  return largest.bits();
}

// Where the row's largest logit is in the warp's segment, and the largest after it. Lanes that hold it are few: all
// lanes go through the chunks of one after another.
template <class T, bool kResident>
__device__ void find_top(const Context<T, kResident>& c, uint32_t lane_bits, uint32_t top_bits, WarpRecord& record) {
  const float top = value_of_bits(top_bits);
  float second = -INFINITY;
  int first = INT_MAX, n = 0;
  for (unsigned holders = __ballot_sync(kAllLanes, lane_bits == top_bits); holders != 0; holders &= holders - 1) {
    const int holder = c.own.first - c.team.lane + __ffs(static_cast<int>(holders)) - 1;
    for (int chunk = holder + kWarp * c.team.lane; chunk < c.own.end; chunk += kWarp * kWarp) {
      float x[kChunk];
      unpack(c.slice.chunk(chunk), x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const bool is_top = x[i] == top;
        n += is_top;
        first = is_top ? min(first, c.slice.begin + kChunk * chunk + i) : first;
        second = is_top ? second : fmaxf(second, x[i]);
      }
    }
  }
  const uint32_t others = lane_bits == top_bits ? ~0u : lane_bits;
  const uint32_t second_bits = __reduce_min_sync(kAllLanes, min(others, rank_bits(second)));
  first = __reduce_min_sync(kAllLanes, first);
  n = __reduce_add_sync(kAllLanes, n);
  if (c.team.lane != 0) return;
  record.first_top = first;
  record.n_top = n;
  record.second = second_bits;
}

// --- the pass over the whole row

struct SegmentSums {
  MassSum weight, entropy, drawn, kept;
};

// f(0) + f(2) + ... plus f(1) + f(3) + ...: one order for every launch.
template <class F>
__device__ __forceinline__ float chunk_sum(F&& f) {
  float even = f(0), odd = f(1);
#pragma unroll
  for (int i = 2; i < kChunk; i += 2) {
    even += f(i);
    odd += f(i + 1);
  }
  return even + odd;
}

// (top - x) exp(x - top) over a chunk; an entry of -inf adds 0.
__device__ __forceinline__ float chunk_entropy(const float (&gap)[kChunk], const float (&weight)[kChunk]) {
  const auto sum = [&](auto&& factor) {
    float even = factor(0) * weight[0], odd = factor(1) * weight[1];
#pragma unroll
    for (int i = 2; i < kChunk; i += 2) {
      even = fmaf(factor(i), weight[i], even);
      odd = fmaf(factor(i + 1), weight[i + 1], odd);
    }
    return even + odd;
  };
  const float entropy = sum([&](int i) { return gap[i]; });
  if (entropy == entropy) return entropy;
  return sum([&](int i) { return weight[i] > 0 ? gap[i] : 0.0f; });  // inf * 0, seldom
}

// Truncated draws keep what is above the pivot for now.
template <Draw kDraw, class T>
__device__ __forceinline__ void add_chunk(const Chunk<T>& chunk, const Scales& scales, float pivot, bool draws,
                                          SegmentSums& sums) {
  float x[kChunk], gap[kChunk], weight[kChunk];
  unpack(chunk, x);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    gap[i] = scales.top - x[i];
    weight[i] = exp2_approx(gap[i] * scales.stats);
  }
  float total = chunk_sum([&](int i) { return weight[i]; });
  sums.weight.add(total);
  sums.entropy.add(chunk_entropy(gap, weight));
  if constexpr (kDraw == Draw::kGreedy) return;
  if (!draws) return;
  if (scales.tempered()) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) weight[i] = exp2_approx(gap[i] * scales.draw);
    if constexpr (kDraw == Draw::kTruncated) total = chunk_sum([&](int i) { return weight[i]; });
  }
  if constexpr (kDraw == Draw::kTruncated) sums.drawn.add(total);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (kDraw == Draw::kWhole || x[i] > pivot) sums.kept.add(weight[i]);
  }
}

// A lane's sums over 8 tiles are below 256: they are exact so long.
constexpr int kExactTiles = 8;

template <Draw kDraw, class T, bool kResident>
__device__ void add_segment(const Context<T, kResident>& c, const Scales& scales, float pivot, bool draws,
                            WarpRecord& record) {
  uint64_t weight = 0, entropy = 0, drawn = 0, kept = 0;
  for (int first_tile = 0; first_tile < c.p.layout.tiles; first_tile += kExactTiles) {
    SegmentSums sums;
    const int end_tile = min(first_tile + kExactTiles, c.p.layout.tiles);
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile) {
      sums.kept = MassSum();
#pragma unroll 2
      for (int k = 0; k < kSteps; ++k) {
        if (c.chunk_of(tile, k) >= c.own.end) break;
        add_chunk<kDraw>(c.slice.chunk(c.chunk_of(tile, k)), scales, pivot, draws, sums);
      }
      if constexpr (kDraw != Draw::kGreedy) {
        const uint64_t tile_mass = warp_total_of_tiles(sums.kept.mass());
        if (c.team.lane == 0) c.tile_sums[tile] = tile_mass;
        kept += tile_mass;
      }
    }
    weight += sums.weight.mass();
    entropy += sums.entropy.mass();
    if constexpr (kDraw == Draw::kTruncated) drawn += sums.drawn.mass();
  }
  weight = warp_total(weight);
  entropy = warp_total(entropy);
  if constexpr (kDraw == Draw::kTruncated) drawn = warp_total(drawn);
  if (c.team.lane != 0) return;
  record.weight = weight;
  record.entropy = entropy;
  record.drawn = drawn;
  record.kept = kept;
}

}  // namespace diffullama::token_stats
