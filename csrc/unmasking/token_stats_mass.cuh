// SPDX-License-Identifier: Apache-2.0
// Weights of logits as integers of 2^-44 of the largest, and their exact sums for token_stats.
//
// A weight is ex2((top - x) * scale) in float; its mass is floor(weight * 2^44). Masses are added as doubles that start
// at 256, where a double's last bit is worth 2^-44: adding with rounding down adds exactly the floor, so a sum does not
// depend on its order. A weight becomes a double by one integer multiply-add, so an entry costs two instructions.
#pragma once

#include <cfloat>

#include "../common/simt.cuh"
#include "unmasking_math.h"

namespace diffullama::token_stats {

constexpr double kMassStart = 256.0;  // 2^(52 - kMassBits): sums stay exact up to 256 entries of full mass
static_assert(kMassBits == 44, "the last bit of a double in [256, 512) is 2^-44");

// A float from 0 (not -0) up as a double: exact but for 0 and denormals, which become less than 2^-126.
__device__ __forceinline__ double widened(float v) {
  constexpr uint64_t kExponents = uint64_t{1023 - 127} << 52;
  return __longlong_as_double(static_cast<int64_t>(uint64_t{__float_as_uint(v)} * (uint64_t{1} << 29) + kExponents));
}

// Up to 256 of weight.
class MassSum {
 public:
  __device__ __forceinline__ void add(float weight) { sum_ = __dadd_rd(sum_, widened(weight)); }
  __device__ __forceinline__ uint64_t mass() const {
    return static_cast<uint64_t>(__double_as_longlong(sum_) - __double_as_longlong(kMassStart));
  }

 private:
  double sum_ = kMassStart;
};

__device__ __forceinline__ uint64_t mass_of(float weight) {
  MassSum sum;
  sum.add(weight);
  return sum.mass();
}

// exp((x - top) / T) = ex2((top - x) * scale) with a negative scale: top - x is never -0, which add() would take wrong.
struct Scales {
  float top;
  float stats, draw;  // -log2(e), and -log2(e) / T

  __device__ __forceinline__ bool tempered() const { return stats != draw; }
  __device__ __forceinline__ float draw_log2(float x) const { return (top - x) * draw; }
  __device__ __forceinline__ float draw_weight(float x) const { return exp2_approx(draw_log2(x)); }
};

// T is bounded so that neither 0 * draw nor inf * draw is NaN.
__device__ __forceinline__ Scales scales_of(float top, float temperature) {
  constexpr float kLog2E = 1.44269504088896341f;
  const float bounded = fminf(fmaxf(temperature, 1e-37f), 1e37f);
  return {top, -kLog2E, temperature == 1.0f ? -kLog2E : -kLog2E / bounded};
}

// --- sums and scans over a warp, modulo 2^64

__device__ __forceinline__ uint64_t warp_total(uint64_t v) {
  constexpr unsigned kMask = (1u << 22) - 1;  // 32 of them fit 27 bits
  const uint64_t low = __reduce_add_sync(kAllLanes, static_cast<unsigned>(v) & kMask);
  const uint64_t middle = __reduce_add_sync(kAllLanes, static_cast<unsigned>(v >> 22) & kMask);
  const uint64_t high = __reduce_add_sync(kAllLanes, static_cast<unsigned>(v >> 44));
  return low + (middle << 22) + (high << 44);
}

// The same for values below 2^54.
__device__ __forceinline__ uint64_t warp_total_of_tiles(uint64_t v) {
  constexpr unsigned kMask = (1u << 27) - 1;
  const uint64_t low = __reduce_add_sync(kAllLanes, static_cast<unsigned>(v) & kMask);
  const uint64_t high = __reduce_add_sync(kAllLanes, static_cast<unsigned>(v >> 27));
  return low + (high << 27);
}

__device__ __forceinline__ uint64_t warp_inclusive_sums(uint64_t v) {
  const int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, v, offset);
    if (lane >= offset) v += other;
  }
  return v;
}

// The first lane whose inclusive sum of v exceeds target, which becomes the target within that lane; kWarp where none
// does, and target falls by the whole sum.
__device__ __forceinline__ int descend(uint64_t v, uint64_t& target) {
  const uint64_t sum = warp_inclusive_sums(v);
  const unsigned beyond = __ballot_sync(kAllLanes, sum > target);
  const int lane = beyond == 0 ? kWarp : __ffs(static_cast<int>(beyond)) - 1;
  target -= __shfl_sync(kAllLanes, lane == kWarp ? sum : sum - v, lane == kWarp ? kWarp - 1 : lane);
  return lane;
}

}  // namespace diffullama::token_stats
