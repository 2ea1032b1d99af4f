// SPDX-License-Identifier: Apache-2.0
// fragment_mask and mask_tile_classes on CUDA.
//   fragment_mask            : 128 threads make two neighbouring tiles of 64 x 128; a thread reads the four words
//                              (16 B) of its two rows, and writes its 64 bits (8 B; a warp 256 B)
//   fragment_mask_transposed : 128 threads read 8 words of 128 queries (32 B a thread, a whole sector), transpose them
//                              as 32 x 32 blocks by shuffles into shared memory, and write four tiles of 64 keys
//   mask_tile_classes        : a warp reads a tile until it has seen both values; four words in flight a lane
//   traffic : the words once (tiles that share a sector are one block's), the fragments once
//   bound   : memory, or L2 for words just made; the transpose issue, about 400 instructions a warp and 1024 words
//   int64   : every offset
// Not yet measured on GPU.
// ptxas spills 16 B on sm_86 and sm_89 of mask_tile_classes_kernel, for occupancy; none on sm_90.
#include "../common/launch.h"
#include "../common/simt.cuh"
#include "attention_mask_kernel.h"
#include "attention_mask_math.h"
#include "attention_mask_plan.h"
#include "mask_warp.cuh"

namespace diffullama {
namespace {

// Four consecutive words of row q, from a word that four divide. Bits past the last key read as 0 whatever they are.
template <bool kAligned>
__device__ __forceinline__ uint4 read_words(const FragmentMaskParams& p, int64_t m, int64_t q, int64_t w) {
  const int64_t n_words = words_per_row(p.Lk);
  if (q >= p.Lq || w >= n_words) return {0, 0, 0, 0};
  const uint32_t* const row = p.words + (m * p.Lq + q) * n_words + w;
  uint4 words;
  if constexpr (kAligned) {
    words = __ldg(reinterpret_cast<const uint4*>(row));
  } else {
    words.x = __ldg(row);
    words.y = w + 1 < n_words ? __ldg(row + 1) : 0u;
    words.z = w + 2 < n_words ? __ldg(row + 2) : 0u;
    words.w = w + 3 < n_words ? __ldg(row + 3) : 0u;
  }
  if (32 * (w + 4) > p.Lk) {
    words.x &= bits_up_to(p.Lk - 1, w);
    words.y &= bits_up_to(p.Lk - 1, w + 1);
    words.z &= bits_up_to(p.Lk - 1, w + 2);
    words.w &= bits_up_to(p.Lk - 1, w + 3);
  }
  return words;
}

// A thread's 64 bits, from the 128 columns of its two rows.
__device__ __forceinline__ uint2 fragment_of(uint4 row0, uint4 row1) {
  const int pair = threadIdx.x % 4;
  return {fragment_bits(row0.x, row1.x, pair) | fragment_bits(row0.y, row1.y, pair) << 16,
          fragment_bits(row0.z, row1.z, pair) | fragment_bits(row0.w, row1.w, pair) << 16};
}

template <bool kAligned>
__global__ void __launch_bounds__(kFragmentThreads) fragment_mask_kernel(FragmentMaskParams p) {
  const int64_t row_tiles = (p.Lq + kFragmentRows - 1) / kFragmentRows;
  const int64_t column_tiles = (p.Lk + kFragmentColumns - 1) / kFragmentColumns;
  const int64_t m = blockIdx.x / row_tiles, row_tile = blockIdx.x % row_tiles;
  const int64_t q = row_tile * kFragmentRows + fragment_row(threadIdx.x);
  uint2* const out = reinterpret_cast<uint2*>(p.fragments) +
                     (m * row_tiles + row_tile) * column_tiles * kFragmentThreads + threadIdx.x;
  for (int64_t group = blockIdx.y; group * kFragmentColumnTiles < column_tiles; group += gridDim.y) {
    uint4 row0[kFragmentColumnTiles], row1[kFragmentColumnTiles];
#pragma unroll
    for (int k = 0; k < kFragmentColumnTiles; ++k) {
      const int64_t w = (group * kFragmentColumnTiles + k) * kFragmentTileWords;
      row0[k] = read_words<kAligned>(p, m, q, w);
      row1[k] = read_words<kAligned>(p, m, q + 8, w);
    }
#pragma unroll
    for (int k = 0; k < kFragmentColumnTiles; ++k) {
      const int64_t tile = group * kFragmentColumnTiles + k;
      if (tile < column_tiles) out[tile * kFragmentThreads] = fragment_of(row0[k], row1[k]);
    }
  }
}

constexpr int kTransposedKeys = kFragmentRows * kFragmentTransposedRowTiles, kTransposedWords = kTransposedKeys / 32;

struct TransposedShared {
  uint4 queries[kTransposedKeys];  // of a key: the bits of the block's 128 queries
};

template <bool kAligned>
__global__ void __launch_bounds__(kFragmentThreads) fragment_mask_transposed_kernel(FragmentMaskParams p) {
  TransposedShared& shared = static_shared<TransposedShared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row_tiles = (p.Lk + kFragmentRows - 1) / kFragmentRows;
  const int64_t column_tiles = (p.Lq + kFragmentColumns - 1) / kFragmentColumns;
  const int64_t groups = (row_tiles + kFragmentTransposedRowTiles - 1) / kFragmentTransposedRowTiles;
  const int64_t m = blockIdx.x / groups, group = blockIdx.x % groups;
  for (int64_t column_tile = blockIdx.y; column_tile < column_tiles; column_tile += gridDim.y) {
    const int64_t q = column_tile * kFragmentColumns + threadIdx.x;
    uint4 words[kTransposedWords / 4];
#pragma unroll
    for (int k = 0; k < kTransposedWords / 4; ++k) {
      words[k] = read_words<kAligned>(p, m, q, group * kTransposedWords + 4 * k);
    }
    __syncthreads();  // the last tiles' bits may still be read
    uint32_t* const queries = &shared.queries[0].x + warp;
#pragma unroll
    for (int k = 0; k < kTransposedWords / 4; ++k) {
      queries[4 * (32 * (4 * k) + lane)] = transpose_in_warp(words[k].x);
      queries[4 * (32 * (4 * k + 1) + lane)] = transpose_in_warp(words[k].y);
      queries[4 * (32 * (4 * k + 2) + lane)] = transpose_in_warp(words[k].z);
      queries[4 * (32 * (4 * k + 3) + lane)] = transpose_in_warp(words[k].w);
    }
    __syncthreads();
    for (int k = 0; k < kFragmentTransposedRowTiles; ++k) {
      const int64_t row_tile = group * kFragmentTransposedRowTiles + k;
      if (row_tile >= row_tiles) break;
      const uint4* const rows = shared.queries + k * kFragmentRows + fragment_row(threadIdx.x);
      uint2* const out = reinterpret_cast<uint2*>(p.fragments) +
                         ((m * row_tiles + row_tile) * column_tiles + column_tile) * kFragmentThreads;
      out[threadIdx.x] = fragment_of(rows[0], rows[8]);
    }
  }
}

// --- tile classes

constexpr int kTileLoads = 4;  // in flight a lane

// A warp takes lanes_per_row (a power of two) words of 32 / lanes_per_row rows at a time.
__global__ void __launch_bounds__(kMaskThreads) mask_tile_classes_kernel(TileClassesParams p, int lanes_per_row) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row_tiles = (p.Lq + p.tile_rows - 1) / p.tile_rows;
  const int64_t column_tiles = (p.Lk + p.tile_cols - 1) / p.tile_cols;
  const int64_t tile = int64_t{blockIdx.x} * kMaskWarps + threadIdx.x / kWarp;
  if (tile >= p.M * row_tiles * column_tiles) return;
  const int64_t m_and_row = tile / column_tiles, m = m_and_row / row_tiles;
  const int64_t first_row = m_and_row % row_tiles * p.tile_rows, first_column = tile % column_tiles * p.tile_cols;
  const int64_t n_words = words_per_row(p.Lk), first_word = first_column / 32;
  // Relative to these from here on.
  const int n_rows = static_cast<int>(min(p.tile_rows, p.Lq - first_row));
  const int64_t column_begin = first_column % 32, column_end = column_begin + min(p.tile_cols, p.Lk - first_column);
  const int tile_words = static_cast<int>((column_end + 31) / 32), rows_per_step = kWarp / lanes_per_row;
  const uint32_t* const words = p.words + (m * p.Lq + first_row) * n_words + first_word;
  bool any_allowed = false, any_forbidden = false;  // of this lane; the loops are uniform over the warp
  for (int word_step = 0; word_step < tile_words; word_step += lanes_per_row) {
    const int w = word_step + lane % lanes_per_row;
    const uint32_t inside = bits_between(column_begin, column_end, w);
    for (int64_t row_step = 0; row_step < n_rows; row_step += kTileLoads * rows_per_step) {
      uint32_t allowed[kTileLoads];
#pragma unroll
      for (int k = 0; k < kTileLoads; ++k) {
        const int64_t row = row_step + k * rows_per_step + lane / lanes_per_row;
        allowed[k] = row < n_rows && inside != 0 ? __ldg(words + row * n_words + w) & inside : 0u;
        any_allowed |= allowed[k] != 0;
        any_forbidden |= row < n_rows && allowed[k] != inside;
      }
      if (__any_sync(kAllLanes, any_allowed) && __any_sync(kAllLanes, any_forbidden)) {
        word_step = tile_words;
        break;
      }
    }
  }
  const TileClass found = tile_class(__any_sync(kAllLanes, any_allowed), __any_sync(kAllLanes, any_forbidden));
  if (lane == 0) p.classes[tile] = static_cast<uint8_t>(found);
}

int lanes_for(int64_t tile_cols) {
  const int64_t words = tile_cols % 32 == 0 ? tile_cols / 32 : (tile_cols - 1) / 32 + 2;  // that a tile can touch
  int lanes = 1;
  while (lanes < words && lanes < kWarp) lanes *= 2;
  return lanes;
}

}  // namespace

cudaError_t launch_fragment_mask(const FragmentMaskParams& p, cudaStream_t stream) {
  const MaskGrid grid = fragment_mask_grid(p.M, p.Lq, p.Lk, p.transposed);
  const bool aligned = words_per_row(p.Lk) % 4 == 0 && reinterpret_cast<uintptr_t>(p.words) % 16 == 0;
  const auto run = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)), dim3(kFragmentThreads), 0,
                  stream, p);
  };
  if (p.transposed)
    return run(aligned ? fragment_mask_transposed_kernel<true> : fragment_mask_transposed_kernel<false>);
  return run(aligned ? fragment_mask_kernel<true> : fragment_mask_kernel<false>);
}

cudaError_t launch_mask_tile_classes(const TileClassesParams& p, cudaStream_t stream) {
  const KernelPlan plan = plan_mask_tile_classes(p.M, p.Lq, p.Lk, p.tile_rows, p.tile_cols);
  return launch(mask_tile_classes_kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(plan.block), 0, stream, p,
                lanes_for(p.tile_cols));
}

}  // namespace diffullama
