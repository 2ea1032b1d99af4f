// SPDX-License-Identifier: Apache-2.0
// Tiles of the sm_90a attention kernels and their launch plans.
#pragma once

#include "attention_plan.h"

namespace diffullama {

constexpr bool is_hopper_attention_width(int64_t D) { return D == 64 || D == 128; }

// A block's consumer warpgroups keep 64 queries each and go through the keys 128 at a time, in rings of `stages` tiles
// of K and of V that a producer warpgroup fills.
//   registers : a block starts with as many a thread as 64 Ki allow, in eights, and warpgroups then share those among
//               themselves; a consumer thread holds scores (64), their 16-bit probabilities (32) and D / 2 outputs
//   shared    : Q 128 groups D bytes, K and V 256 D bytes a stage each: 160 KB at D = 128, 152 KB at D = 64
struct HopperAttentionTile {
  int groups, stages, consumer_registers, producer_registers;

  constexpr int rows() const { return 64 * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }
  constexpr bool shares_registers() const {
    return producer_registers + groups * consumer_registers == 65536 / threads() / 8 * 8 * (groups + 1);
  }
};

constexpr int kHopperColumns = 128;

constexpr HopperAttentionTile hopper_attention_tile(int D) {
  return D == 128 ? HopperAttentionTile{2, 2, 232, 40} : HopperAttentionTile{3, 4, 160, 32};
}

static_assert(hopper_attention_tile(64).shares_registers() && hopper_attention_tile(128).shares_registers());

// What the swizzle's alignment may cost is included.
constexpr int64_t hopper_attention_shared_bytes(int D) {
  const HopperAttentionTile tile = hopper_attention_tile(D);
  return tile_bytes(tile.rows() + 2 * tile.stages * kHopperColumns, D) + 1024;
}

// A block a multiprocessor; causal ones, whose tiles differ in work, a block a tile, for the hardware to even out.
inline KernelPlan plan_attention_hopper(const AttentionSizes& s, bool is_half, MaskKind kind, int64_t n_masks,
                                        int n_sm) {
  KernelPlan plan = plan_attention(s, is_half, kind, n_masks);
  const HopperAttentionTile tile = hopper_attention_tile(static_cast<int>(s.D));
  plan.kernel = attention_kernel_name("attention_hopper_forward_kernel", is_half, s.D);
  plan.grid = s.B * s.H * ceil_div(s.Lq, tile.rows());
  if (kind != MaskKind::kCausal) plan.grid = std::min<int64_t>(plan.grid, n_sm);
  plan.block = tile.threads();
  plan.shared_bytes = hopper_attention_shared_bytes(static_cast<int>(s.D));
  return plan;
}

// --- backward

constexpr int kHopperKeys = 128, kHopperBackwardGroups = 2, kHopperBackwardThreads = 128 * (1 + kHopperBackwardGroups);

// A block keeps 128 keys, 64 a consumer warpgroup, and goes through the queries of all heads that share them, `queries`
// at a time, in a ring of `stages` tiles of Q and of dO. A consumer thread holds dK and dV (D / 2 each), S^T and dP^T
// (queries / 2 each); then dQ (32) and what goes to the next products as 16 bits (queries / 4 each).
//   shared : K and V 512 D bytes, Q and dO 4 queries D a stage, dS 512 queries: 193.5 KB at D = 128, 195 KB at D = 64
struct HopperBackwardTile {
  int queries, stages, consumer_registers, producer_registers;

  constexpr bool shares_registers() const {
    return producer_registers + kHopperBackwardGroups * consumer_registers ==
           65536 / kHopperBackwardThreads / 8 * 8 * (kHopperBackwardGroups + 1);
  }
};

constexpr HopperBackwardTile hopper_backward_tile(int D) {
  return D == 128 ? HopperBackwardTile{64, 3, 240, 24} : HopperBackwardTile{128, 3, 240, 24};
}

static_assert(hopper_backward_tile(64).shares_registers() && hopper_backward_tile(128).shares_registers());

// Two buffers of dS; statistics of the queries in every stage; what the swizzle's alignment may cost.
constexpr int64_t hopper_backward_shared_bytes(int D) {
  const HopperBackwardTile tile = hopper_backward_tile(D);
  return tile_bytes(2 * kHopperKeys + 2 * tile.stages * tile.queries, D) + 2 * tile_bytes(kHopperKeys, tile.queries) +
         tile.stages * tile.queries * 8 + 1024;
}

// Queries of a head with those that fill its last tile.
inline int64_t hopper_backward_queries(const AttentionSizes& s) {
  const int queries = hopper_backward_tile(static_cast<int>(s.D)).queries;
  return ceil_div(s.Lq, queries) * queries;
}

// The ticket, and a turn for every warp of the consumers and tile of queries.
inline int64_t hopper_backward_counters(const AttentionSizes& s) {
  return 1 +
         4 * kHopperBackwardGroups * s.B * s.H * ceil_div(s.Lq, hopper_backward_tile(static_cast<int>(s.D)).queries);
}

// Blocks take tiles of keys from a counter, so that what a mask leaves is evened out.
inline KernelPlan plan_attention_hopper_backward(const AttentionSizes& s, bool is_half, MaskKind kind, int64_t n_masks,
                                                 int n_sm) {
  KernelPlan plan = plan_attention_backward(s, is_half, kind, n_masks);
  plan.kernel = attention_kernel_name("attention_hopper_backward_kernel", is_half, s.D, ", false");
  plan.grid = std::min<int64_t>(s.B * s.Hkv * ceil_div(s.Lk, kHopperKeys), n_sm);
  plan.block = kHopperBackwardThreads;
  plan.shared_bytes = hopper_backward_shared_bytes(static_cast<int>(s.D));
  return plan;
}

}  // namespace diffullama
