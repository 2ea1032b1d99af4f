// SPDX-License-Identifier: Apache-2.0
// Launch plan of token_stats: how many blocks share a row, and how a block divides its slice of it and its shared
// memory.
#pragma once

#include <algorithm>

#include "../common/kernel_plan.h"

namespace diffullama {

enum class Draw { kGreedy, kWhole, kTruncated };  // kTruncated: top-k or top-p

constexpr int kChunk = 8;         // entries that a lane takes at once, from a multiple of 8 in the row
constexpr int kTileChunks = 128;  // a tile is the unit of the inverse CDF: 4 steps of a warp
constexpr int kTokenStatsWarps = 8;
constexpr int kTokenStatsMaxCluster = 8;
constexpr int kListed = 256;                         // entries near the cut that a warp remembers
constexpr int64_t kTokenStatsStaticBytes = 6 << 10;  // bound of the kernels' static shared memory

// Offsets in bytes from the start of the dynamic shared memory.
struct TokenStatsLayout {
  int slice;    // entries of the row that a block takes; the row's last block has what is left
  int warps;    // of a block
  int segment;  // chunks of the slice that a warp takes
  int tiles;    // of a segment
  int tile_sums, list_ends, lists, bytes;
};

struct TokenStatsPlan {
  KernelPlan launch;
  TokenStatsLayout layout;
  bool resident;  // the row stays in shared memory; otherwise every pass reads it again, from L2
};

inline TokenStatsLayout token_stats_layout(int64_t V, int element_size, int cluster, Draw draw, bool resident) {
  TokenStatsLayout s{};
  const auto chunks = static_cast<int>(ceil_div(ceil_div(V, kChunk), cluster));
  s.slice = kChunk * chunks;
  s.warps = static_cast<int>(std::clamp<int64_t>(ceil_div(chunks, 64), 1, kTokenStatsWarps));
  s.segment = static_cast<int>(ceil_div(chunks, s.warps));
  s.tiles = static_cast<int>(ceil_div(s.segment, kTileChunks));
  s.tile_sums = resident ? s.slice * element_size : 0;
  s.list_ends = s.tile_sums + (draw == Draw::kGreedy ? 0 : s.warps * s.tiles * 8);
  s.lists = s.list_ends + (draw == Draw::kTruncated ? s.warps * s.tiles * 4 : 0);
  s.bytes = std::max(s.lists + (draw == Draw::kTruncated ? s.warps * kListed * 2 : 0), 16);
  return s;
}

// Three blocks a multiprocessor, so that some load while others compute, and blocks for all multiprocessors.
inline int token_stats_cluster(int64_t N, int64_t V, int element_size, Draw draw, const DeviceLimits& device) {
  const auto shared = [&](int cluster) {
    return token_stats_layout(V, element_size, cluster, draw, true).bytes + kTokenStatsStaticBytes + 1024;
  };
  int cluster = 1;
  if (!device.clusters) return cluster;
  while (cluster < kTokenStatsMaxCluster && 3 * shared(cluster) > device.shared_bytes + 1024) cluster *= 2;
  while (cluster < kTokenStatsMaxCluster && N * cluster < 2 * device.n_sm && V / cluster >= 4096) cluster *= 2;
  return cluster;
}

inline TokenStatsPlan plan_token_stats(int64_t N, int64_t V, int element_size, Draw draw, const DeviceLimits& device) {
  TokenStatsPlan plan{};
  const int cluster = token_stats_cluster(N, V, element_size, draw, device);
  plan.layout = token_stats_layout(V, element_size, cluster, draw, true);
  plan.resident = plan.layout.bytes + kTokenStatsStaticBytes <= device.shared_bytes;
  if (!plan.resident) plan.layout = token_stats_layout(V, element_size, cluster, draw, false);
  plan.launch.kernel = draw == Draw::kGreedy  ? "token_stats_greedy_kernel"
                       : draw == Draw::kWhole ? "token_stats_whole_kernel"
                                              : "token_stats_truncated_kernel";
  plan.launch.grid = N * cluster;
  plan.launch.block = 32 * plan.layout.warps;
  plan.launch.cluster = cluster;
  plan.launch.shared_bytes = plan.layout.bytes;
  plan.launch.bytes = N * (V * element_size + 8 + 8 + 8 * 4);  // logits, row_index, token, values
  return plan;
}

}  // namespace diffullama
