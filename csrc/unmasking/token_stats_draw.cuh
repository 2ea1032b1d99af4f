// SPDX-License-Identifier: Apache-2.0
// The end of a row in token_stats: the draw by inverse CDF (block, warp, tile, lane, chunk, entry), and the results.
#pragma once

#include <climits>

#include "../common/cuda_block.cuh"
#include "token_stats_team.cuh"

namespace diffullama::token_stats {

// --- the draw, by the first warp of every block

struct Drawn {
  int token;  // entry of the row
  float x;
  float prob;  // of the draw
};

// The entry drawn, in every lane of the block that holds it; false in the others.
template <Draw kDraw, class T, bool kResident>
__device__ bool draw_token(const Context<T, kResident>& c, const Scales& scales, uint64_t cut, Drawn& out) {
  constexpr int kRounds = kTokenStatsMaxCluster * kTokenStatsWarps / kWarp;
  uint64_t kept[kRounds], sum = 0;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int slot = r * kWarp + c.team.lane;
    sum += kept[r] = c.team.is_used(slot) ? c.team.of_slot(c.shared.warps, slot).kept : 0;
  }
  const uint64_t total = warp_total(sum);
  uint64_t target = draw_target(c.shared.uniform62, total);
  int owner = 0;
#pragma unroll
  for (int r = 0, found = kWarp; r < kRounds; ++r) {
    if (found == kWarp) owner = r * kWarp + (found = descend(kept[r], target));
  }
  if (owner / kTokenStatsWarps != c.team.rank) return false;
  const int warp = owner % kTokenStatsWarps, n_tiles = c.p.layout.tiles;
  const uint64_t* tile_sums = c.tile_sums + (warp - c.team.warp) * n_tiles;
  const int tile = descend(c.team.lane < n_tiles ? tile_sums[c.team.lane] : 0, target);

  const auto mass_at = [&](float x, int i) {
    return kDraw == Draw::kTruncated && rank_of(x, i) > cut ? uint64_t{0} : mass_of(scales.draw_weight(x));
  };
  const int begin = warp * c.p.layout.segment + tile * kTileChunks;
  const int end = min(min(begin + kTileChunks, (warp + 1) * c.p.layout.segment), c.slice.chunks);
  uint64_t lane_mass = 0, masses[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {  // consecutive chunks here, as the order counts
    const int chunk = begin + kSteps * c.team.lane + k;
    masses[k] = 0;
    if (chunk < end) {
      float x[kChunk];
      unpack(c.slice.chunk(chunk), x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) masses[k] += mass_at(x[i], c.slice.begin + kChunk * chunk + i);
    }
    lane_mass += masses[k];
  }
  const int lane = descend(lane_mass, target);
  int step = 0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint64_t mass = __shfl_sync(kAllLanes, masses[k], lane);
    if (step == k && target >= mass) {
      target -= mass;
      ++step;
    }
  }
  const int entry = kChunk * (begin + kSteps * lane + step);
  const bool in_chunk = c.team.lane < kChunk;
  const float x = in_chunk ? c.slice.value(entry + c.team.lane) : -INFINITY;
  const uint64_t mass = in_chunk ? mass_at(x, c.slice.begin + entry + c.team.lane) : 0;
  const int place = descend(mass, target);
  out.token = c.slice.begin + entry + place;
  out.x = __shfl_sync(kAllLanes, x, place);
  const uint64_t share = __shfl_sync(kAllLanes, mass, place);
  out.prob = static_cast<float>(static_cast<double>(share) / static_cast<double>(total));
  return true;
}

// --- the results of a row

__device__ __forceinline__ void write_invalid(const TokenStatsParams& p, int64_t n) {
  p.token[n] = -1;
  for (int k = 0; k < 8; ++k) p.values[k * p.N + n] = NAN;
}

// By one warp, after the sums of all are there; greedy takes the token here.
template <Draw kDraw, class T, bool kResident>
__device__ void write_row(const Context<T, kResident>& c, float top, Drawn drawn) {
  constexpr double kUnit = 1.0 / static_cast<double>(uint64_t{1} << kMassBits);
  const double sum = kUnit * static_cast<double>(c.team.total(c.shared.warps, &WarpRecord::weight));
  const double entropy = kUnit * static_cast<double>(c.team.total(c.shared.warps, &WarpRecord::entropy));
  uint32_t second = ~0u;
  int first = INT_MAX, n_top = 0;
#pragma unroll 1
  for (int slot = c.team.lane; slot < c.team.n_slots(); slot += kWarp) {
    if (!c.team.is_used(slot)) continue;
    const WarpRecord& record = c.team.of_slot(c.shared.warps, slot);
    second = min(second, record.second);
    first = min(first, record.first_top);
    n_top += record.n_top;
  }
  second = __reduce_min_sync(kAllLanes, second);
  first = __reduce_min_sync(kAllLanes, first);
  n_top = __reduce_add_sync(kAllLanes, n_top);
  if (c.team.lane != 0) return;
  if constexpr (kDraw == Draw::kGreedy) drawn = {first, top, 1.0f};
  const float x2 = n_top > 1 ? top : value_of_bits(second);
  const float inverse = static_cast<float>(1.0 / sum), log_sum = logf(static_cast<float>(sum));
  const float values[8] = {expf(drawn.x - top) * inverse,
                           drawn.prob,
                           inverse,
                           expf(x2 - top) * inverse,
                           top - x2,
                           log_sum + static_cast<float>(entropy / sum),
                           top + log_sum,
                           expf(c.shared.current - top) * inverse};
  c.p.token[c.n] = drawn.token;
#pragma unroll
  for (int k = 0; k < 8; ++k) c.p.values[k * c.p.N + c.n] = values[k];
}

}  // namespace diffullama::token_stats
