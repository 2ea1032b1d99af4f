// SPDX-License-Identifier: Apache-2.0
// Launch plans of the mask kernels; M masks of Lq queries and Lk keys. A grid's x counts rows of the mask or of tiles,
// its y their words or columns of tiles (at most kMaxGridY: kernels loop).
#pragma once

#include <algorithm>

#include "../common/kernel_plan.h"

namespace diffullama {

constexpr int kMaskThreads = 256;
constexpr int kMaskWarps = kMaskThreads / 32;
constexpr int64_t kMaxGridY = 65535;

// The grid of the mask kernels in its two dimensions; plan.grid is their product.
struct MaskGrid {
  int64_t x = 0, y = 1;
};

inline KernelPlan mask_plan(const char* kernel, MaskGrid grid, int block, int64_t bytes) {
  KernelPlan plan{kernel};
  plan.grid = grid.x * grid.y;
  plan.block = block;
  plan.bytes = bytes;
  return plan;
}

inline int64_t mask_word_bytes(int64_t M, int64_t Lq, int64_t Lk) { return M * Lq * ceil_div(Lk, 32) * 4; }

// --- bools and words. Whole words and aligned tensors: a thread takes 16 keys at a time wherever they lie; otherwise a
// warp takes 32 words of a row.
constexpr int kFlatKeys = 16, kFlatPerThread = 4;

inline MaskGrid bool_mask_grid(int64_t M, int64_t Lq, int64_t Lk, bool flat) {
  if (flat) return {ceil_div(M * Lq * (Lk / kFlatKeys), int64_t{kMaskThreads} * kFlatPerThread), 1};
  return {ceil_div(M * Lq, kMaskWarps), std::min(ceil_div(Lk, 32 * 32), kMaxGridY)};
}

inline KernelPlan plan_pack_mask(int64_t M, int64_t Lq, int64_t Lk, bool flat) {
  return mask_plan(flat ? "pack_mask_flat_kernel" : "pack_mask_rows_kernel", bool_mask_grid(M, Lq, Lk, flat),
                   kMaskThreads, M * Lq * Lk + mask_word_bytes(M, Lq, Lk));
}

inline KernelPlan plan_unpack_mask(int64_t M, int64_t Lq, int64_t Lk, bool flat) {
  return mask_plan(flat ? "unpack_mask_flat_kernel" : "unpack_mask_rows_kernel", bool_mask_grid(M, Lq, Lk, flat),
                   kMaskThreads, M * Lq * Lk + mask_word_bytes(M, Lq, Lk));
}

// --- words from ids: a block takes 64 rows and 1024 keys at a time
constexpr int kIdRows = 64, kIdKeys = 32 * 32;

inline MaskGrid id_mask_grid(int64_t M, int64_t Lq, int64_t Lk) {
  return {M * ceil_div(Lq, kIdRows), std::min(ceil_div(Lk, kIdKeys), kMaxGridY)};
}

inline KernelPlan plan_id_mask(int64_t M, int64_t Lq, int64_t Lk) {
  KernelPlan plan = mask_plan("id_mask_kernel", id_mask_grid(M, Lq, Lk), kMaskThreads,
                              mask_word_bytes(M, Lq, Lk) + M * (Lq + Lk) * 8);
  plan.shared_bytes = kIdKeys * 8;
  return plan;
}

// --- annealed words: a warp takes 32 consecutive words of a row; 4 times where that leaves enough to fill the device
constexpr int kAnnealedSteps = 4;
inline int annealed_steps(int64_t length) { return length >= 8192 ? kAnnealedSteps : 1; }

inline MaskGrid annealed_mask_grid(int64_t length) {
  const int64_t chunks = ceil_div(ceil_div(length, 32), 32 * annealed_steps(length));
  return {ceil_div(length, kMaskWarps), std::min(chunks, kMaxGridY)};
}

inline KernelPlan plan_annealed_mask(int64_t length) {
  KernelPlan plan =
      mask_plan("annealed_mask_kernel", annealed_mask_grid(length), kMaskThreads, mask_word_bytes(1, length, length));
  plan.shared_bytes = 32 * 4;
  return plan;
}

// --- fragment order: a block takes 64 rows and 256 columns, or of the transpose 256 rows and 128 columns, so that it
// reads whole sectors of 32 bytes
constexpr int kFragmentColumnTiles = 2, kFragmentTransposedRowTiles = 4;

inline MaskGrid fragment_mask_grid(int64_t M, int64_t Lq, int64_t Lk, bool transposed) {
  if (transposed) {
    return {M * ceil_div(Lk, 64 * kFragmentTransposedRowTiles), std::min(ceil_div(Lq, 128), kMaxGridY)};
  }
  return {M * ceil_div(Lq, 64), std::min(ceil_div(Lk, 128 * kFragmentColumnTiles), kMaxGridY)};
}

inline KernelPlan plan_fragment_mask(int64_t M, int64_t Lq, int64_t Lk, bool transposed) {
  const int64_t rows = transposed ? Lk : Lq, columns = transposed ? Lq : Lk;
  const int64_t written = M * ceil_div(rows, 64) * ceil_div(columns, 128) * 128 * 8;
  KernelPlan plan = mask_plan(transposed ? "fragment_mask_transposed_kernel" : "fragment_mask_kernel",
                              fragment_mask_grid(M, Lq, Lk, transposed), 128, mask_word_bytes(M, Lq, Lk) + written);
  plan.shared_bytes = transposed ? 64 * kFragmentTransposedRowTiles * 16 : 0;
  return plan;
}

// --- tile classes: a warp takes a tile
inline KernelPlan plan_mask_tile_classes(int64_t M, int64_t Lq, int64_t Lk, int64_t tile_rows, int64_t tile_cols) {
  const int64_t tiles = M * ceil_div(Lq, tile_rows) * ceil_div(Lk, tile_cols);
  return mask_plan("mask_tile_classes_kernel", {ceil_div(tiles, kMaskWarps), 1}, kMaskThreads,
                   mask_word_bytes(M, Lq, Lk) + tiles);
}

}  // namespace diffullama
