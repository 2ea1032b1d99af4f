// SPDX-License-Identifier: Apache-2.0
// Tiles of the attention kernels and their launch plans. B batch, H heads of queries, Hkv of keys, Lq queries, Lk keys,
// D head size.
#pragma once

#include <algorithm>
#include <string>

#include "../common/kernel_plan.h"

namespace diffullama {

constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps;
constexpr int kAttentionBlocksPerSm = 2;  // what registers allow: 255 a thread
constexpr int kClassTile = 64;            // queries and keys of an entry of tile_classes

constexpr int kSumsRows = 64;  // queries of a tile of float32 sums of dQ (attention_query_sums.cuh)

constexpr bool is_attention_width(int64_t D) { return D == 32 || D == 64 || D == 96 || D == 128 || D == 256; }

// A block keeps `rows` of one operand for its whole life, a quarter of them a warp, and goes through the other operand
// `columns` at a time, in a ring of `stages` buffers of [columns, D].
struct AttentionTile {
  int rows, columns, stages;
};

// Bounds: accumulators of a thread (rows * (D + columns) / 128 in the forward) leave room in 255 registers; two blocks
// a multiprocessor of 164 KB (sm_80) or 228 KB (sm_90) up to D = 128; one in the 99 KB of sm_86, sm_89 and sm_120.

// Rows are queries. Kept: Q. Ring: K and V in turn.
constexpr AttentionTile forward_tile(int D) {
  return D == 256 ? AttentionTile{64, 32, 3} : D >= 96 ? AttentionTile{128, 64, 3} : AttentionTile{128, 64, 4};
}

// Rows are keys. Kept: K and V. Ring: dO and Q in turn. dS^T goes through shared memory to become dQ, as many queries
// at a time as key_gradient_exchange says. At D = 256 dK and dV together do not fit in registers: a launch for each.
constexpr AttentionTile key_gradient_tile(int D) {
  return D == 256   ? AttentionTile{64, 32, 2}
         : D == 128 ? AttentionTile{64, 64, 2}
         : D == 96  ? AttentionTile{64, 64, 3}
         : D == 64  ? AttentionTile{128, 32, 4}
                    : AttentionTile{128, 64, 4};
}
constexpr int key_gradient_exchange(int D) { return D == 256 ? 16 : key_gradient_tile(D).columns; }
constexpr bool key_gradients_together(int D) { return D <= 128; }

constexpr int64_t tile_bytes(int rows, int D) { return int64_t{2} * rows * D; }

constexpr int64_t forward_shared_bytes(int D) {
  const AttentionTile tile = forward_tile(D);
  return tile_bytes(tile.rows + tile.stages * tile.columns, D);
}

// Besides: statistics of two tiles of queries (float2 each), and dS^T.
constexpr int64_t key_gradient_shared_bytes(int D) {
  const AttentionTile tile = key_gradient_tile(D);
  return tile_bytes(2 * tile.rows + tile.stages * tile.columns, D) + 2 * tile.columns * 8 +
         tile_bytes(tile.rows, key_gradient_exchange(D));
}

struct AttentionSizes {
  int64_t B, H, Hkv, Lq, Lk, D;
  int64_t element_size = 2;
};

// float32 sums of dQ: whole tiles.
inline int64_t query_sums_size(const AttentionSizes& s) {
  return s.B * s.H * ceil_div(s.Lq, kSumsRows) * kSumsRows * s.D;
}
// int32 of QueryTurns, where a kernel goes through `columns` queries at a time.
inline int64_t query_turns_size(const AttentionSizes& s, int columns) {
  return 1 + s.B * s.H * ceil_div(s.Lq, columns);
}

enum class MaskKind { kFull, kCausal, kBits };

// Entries of the Lq x Lk square that a kernel has to work on: with bits all of them, since only the bits know.
inline int64_t attended_entries(const AttentionSizes& s, MaskKind kind) {
  if (kind != MaskKind::kCausal) return s.Lq * s.Lk;
  const int64_t n = std::min(s.Lq, s.Lk);
  return n * (n + 1) / 2 + (s.Lq - n) * s.Lk;
}

inline int64_t mask_bytes(const AttentionSizes& s, MaskKind kind, int64_t n_masks) {
  if (kind != MaskKind::kBits) return 0;
  return n_masks * (s.Lq * ceil_div(s.Lk, 32) * 4 + ceil_div(s.Lq, kClassTile) * ceil_div(s.Lk, kClassTile));
}

// "<kernel><__half, 128>", as the resource report has it.
inline std::string attention_kernel_name(const char* kernel, bool is_half, int64_t D, const char* more = "") {
  return std::string(kernel) + "<" + (is_half ? "__half" : "__nv_bfloat16") + ", " + std::to_string(D) + more + ">";
}

inline int64_t forward_grid(const AttentionSizes& s) {
  return s.B * s.H * ceil_div(s.Lq, forward_tile(static_cast<int>(s.D)).rows);
}
inline int64_t query_gradient_grid(const AttentionSizes& s) { return s.B * s.H * ceil_div(s.Lq, kSumsRows); }
inline int64_t key_gradient_grid(const AttentionSizes& s) {
  return s.B * s.Hkv * ceil_div(s.Lk, key_gradient_tile(static_cast<int>(s.D)).rows);
}

inline KernelPlan plan_attention(const AttentionSizes& s, bool is_half, MaskKind kind, int64_t n_masks) {
  KernelPlan plan{attention_kernel_name("attention_forward_kernel", is_half, s.D)};
  plan.grid = forward_grid(s);
  plan.block = kAttentionThreads;
  plan.shared_bytes = forward_shared_bytes(static_cast<int>(s.D));
  const int64_t queries = s.B * s.H * s.Lq, keys = s.B * s.Hkv * s.Lk;
  plan.bytes = s.element_size * s.D * (2 * queries + 2 * keys) + 4 * queries + mask_bytes(s, kind, n_masks);
  plan.flops = 4 * s.B * s.H * attended_entries(s, kind) * s.D;
  return plan;
}

// The kernel of all five products (at D = 256 the first of its two launches, of four).
inline KernelPlan plan_attention_backward(const AttentionSizes& s, bool is_half, MaskKind kind, int64_t n_masks) {
  KernelPlan plan{
      attention_kernel_name("attention_key_gradient_kernel", is_half, s.D,
                            key_gradients_together(static_cast<int>(s.D)) ? ", true, true" : ", true, false")};
  plan.grid = key_gradient_grid(s);
  plan.block = kAttentionThreads;
  plan.shared_bytes = key_gradient_shared_bytes(static_cast<int>(s.D));
  const int64_t queries = s.B * s.H * s.Lq, keys = s.B * s.Hkv * s.Lk;
  plan.bytes = s.element_size * s.D * (4 * queries + 4 * keys) + 4 * queries + mask_bytes(s, kind, n_masks);
  plan.flops = 10 * s.B * s.H * attended_entries(s, kind) * s.D;
  return plan;
}

}  // namespace diffullama
