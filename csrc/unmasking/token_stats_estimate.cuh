// SPDX-License-Identifier: Apache-2.0
// About where the cut of top-p or top-k lies in a row, from a sample of it: one chunk a lane. Only how long token_stats
// takes depends on it, never what it returns.
#pragma once

#include "../common/cuda_block.cuh"
#include "token_stats_team.cuh"

namespace diffullama::token_stats {

constexpr int kBins = 128;
constexpr int kBinsPerLane = kBins / kWarp;
constexpr float kLowest = -44.0f;  // log2 of the smallest weight with mass

// The row by its sampled entries. Position b + f is where the draw weight is 2^((b + f) * width); the sums are over
// entries before the end of bin b.
struct Estimate {
  unsigned counts[kBins];  // sampled here
  unsigned sampled;        // here, -inf included
  float entries[kBins], weights[kBins];
  float width;
};

__device__ __forceinline__ void clear(Estimate& estimate) {
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) estimate.counts[b] = 0;
  if (threadIdx.x == 0) estimate.sampled = 0;
}

template <class T, bool kResident>
__device__ __forceinline__ bool sample(const Context<T, kResident>& c, float (&x)[kChunk]) {
  const int n_own = c.own.first < c.own.end ? (c.own.end - c.own.first + kWarp - 1) / kWarp : 0;
  if (n_own == 0) return false;
  unpack(c.slice.chunk(c.own.first + kWarp * ((7 * c.team.lane + 3 * c.team.warp) % n_own)), x);
  return true;
}

// Rank bits of the warp's smallest finite sampled entry; 0 where there is none.
template <class T, bool kResident>
__device__ uint32_t sampled_low(const Context<T, kResident>& c) {
  float x[kChunk], low = INFINITY;
  if (sample(c, x)) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) low = x[i] < low && x[i] >= -FLT_MAX ? x[i] : low;
  }
  return __reduce_max_sync(kAllLanes, low < INFINITY ? rank_bits(low) : 0u);
}

template <class T, bool kResident>
__device__ void count_sample(const Context<T, kResident>& c, const Scales& scales, float lowest, Estimate& estimate) {
  const float per_bin = lowest < 0 ? kBins / lowest : 0.0f;
  float x[kChunk];
  const bool sampled = sample(c, x);
  const unsigned lanes = __ballot_sync(kAllLanes, sampled);
  if (c.team.lane == 0) atomicAdd(&estimate.sampled, kChunk * static_cast<unsigned>(__popc(lanes)));
  if (!sampled) return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (!(x[i] >= -FLT_MAX)) continue;
    const float position = fmaxf(scales.draw_log2(x[i]), lowest) * per_bin;
    atomicAdd(&estimate.counts[min(kBins - 1, static_cast<int>(position))], 1u);
  }
}

// Sums over all bins up to each, by one warp.
template <class T, bool kResident>
__device__ void sum_sample(const Context<T, kResident>& c, float lowest, Estimate& estimate) {
  unsigned sampled = 0, counts[kBinsPerLane] = {};
  for (int r = 0; r < c.team.size; ++r) {
    const Estimate& other = *shared_of_rank(&estimate, r);
    sampled += other.sampled;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) counts[i] += other.counts[kBinsPerLane * c.team.lane + i];
  }
  const float unit = static_cast<float>(c.p.V) / static_cast<float>(sampled), width = lowest / kBins;
  float entries = 0, weights = 0, entries_to[kBinsPerLane], weights_to[kBinsPerLane];
#pragma unroll
  for (int i = 0; i < kBinsPerLane; ++i) {
    const float n = unit * static_cast<float>(counts[i]);
    entries_to[i] = entries += n;
    weights_to[i] = weights += n * exp2_approx(width * (static_cast<float>(kBinsPerLane * c.team.lane + i) + 0.5f));
  }
  const float own_entries = entries, own_weights = weights;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const float e = __shfl_up_sync(kAllLanes, entries, offset), w = __shfl_up_sync(kAllLanes, weights, offset);
    entries += c.team.lane >= offset ? e : 0.0f;
    weights += c.team.lane >= offset ? w : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kBinsPerLane; ++i) {
    estimate.entries[kBinsPerLane * c.team.lane + i] = entries_to[i] + (entries - own_entries);
    estimate.weights[kBinsPerLane * c.team.lane + i] = weights_to[i] + (weights - own_weights);
  }
  if (c.team.lane == 0) estimate.width = width;
  __syncwarp();
}

// The position at which a running sum passes target; kBins where it does not. By one warp.
__device__ __forceinline__ float position_of(const float* sums, float target) {
  const int lane = threadIdx.x % kWarp;
  int below = 0;
  for (int b = lane; b < kBins; b += kWarp) below += sums[b] < target;
  below = __reduce_add_sync(kAllLanes, below);
  if (below == kBins) return kBins;
  const float start = below > 0 ? sums[below - 1] : 0.0f, span = sums[below] - start;
  return static_cast<float>(below) + (span > 0 ? fmaxf(target - start, 0.0f) / span : 1.0f);
}

__device__ __forceinline__ float sum_at(const float* sums, float position) {
  if (position >= kBins) return sums[kBins - 1];
  const int b = static_cast<int>(position);
  const float start = b > 0 ? sums[b - 1] : 0.0f;
  return start + (sums[b] - start) * (position - static_cast<float>(b));
}

// The logit at a position, as an entry could have it; -inf past all of them.
template <class T>
__device__ __forceinline__ float value_at(const Estimate& estimate, const Scales& scales, float position) {
  if (position >= kBins) return -INFINITY;
  return static_cast<float>(static_cast<T>(scales.top - position * estimate.width / scales.draw));
}

}  // namespace diffullama::token_stats
