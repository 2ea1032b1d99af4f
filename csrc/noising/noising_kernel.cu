// SPDX-License-Identifier: Apache-2.0
// mask_tokens on CUDA, one cooperative launch.
//   work    : items of 4 positions of one row (one Philox call); a block owns a contiguous range of items, so positions
//             come out in row-major order
//   phases  : draw and write xt, masked, the block's count | grid barrier | prefix over block counts, write positions;
//             row counts and the -1 tail in grid-stride loops
//   traffic : 8 + 1 in, 8 + 1 out a token, then 1 in and 8 out again for the positions; the second read hits L2
//   bound   : launch and barrier latency below about 1e6 tokens, memory above (not yet measured on GPU)
//   int64   : every offset; B * L may pass 2^31
#include "noising_kernel.h"

#include <cooperative_groups.h>

#include "../common/cuda_block.cuh"
#include "../common/launch.h"
#include "noising_math.h"

namespace diffullama {
namespace {

constexpr int kThreads = kMaskTokensThreads;

struct MaskTokensShared {
  int64_t sum[kThreads / kWarp];
  int scan[kThreads / kWarp];
};

struct Item {
  int64_t row, position;  // first of 4 positions
};

__device__ __forceinline__ Item item_of(int64_t index, int64_t items_per_row) {
  return {index / items_per_row, 4 * (index % items_per_row)};
}

// Masks the item's positions, writes xt and masked; returns how many were masked.
__device__ int mask_item(const MaskTokensParams& p, Item item, uint64_t seed) {
  const uint64_t sample = static_cast<uint64_t>(p.sample_index[item.row]);
  const Words4 words = philox_of_sample(seed, sample, static_cast<uint64_t>(item.position) / 4, Tag::kNoise);
  int count = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int64_t position = item.position + k;
    if (position >= p.L) break;
    const int64_t i = item.row * p.L + position;
    const uint64_t threshold = threshold32(p.p_mask[p.p_by_token ? i : item.row]);
    const bool hit = is_masked(words.w[k], threshold, p.maskable == nullptr || p.maskable[i]);
    p.masked[i] = hit;
    p.xt[i] = hit ? p.mask_id : p.x0[i];
    count += hit;
  }
  return count;
}

__device__ int count_item(const MaskTokensParams& p, Item item) {
  int count = 0;
  for (int k = 0; k < 4 && item.position + k < p.L; ++k) count += p.masked[item.row * p.L + item.position + k];
  return count;
}

__device__ void write_item(const MaskTokensParams& p, Item item, int64_t slot) {
  for (int k = 0; k < 4 && item.position + k < p.L; ++k) {
    const int64_t i = item.row * p.L + item.position + k;
    if (p.masked[i]) p.positions[slot++] = i;
  }
}

__device__ void write_counts(const MaskTokensParams& p) {
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp; row < p.B; row += warps) {
    int64_t count = 0;
    for (int64_t position = threadIdx.x % kWarp; position < p.L; position += kWarp)
      count += p.masked[row * p.L + position];
    count = warp_sum(count);
    if (threadIdx.x % kWarp == 0) p.counts[row] = count;
  }
}

__global__ void __launch_bounds__(kThreads, kMaskTokensBlocksPerSm) mask_tokens_kernel(MaskTokensParams p) {
  MaskTokensShared& shared = static_shared<MaskTokensShared>();
  const int64_t items_per_row = (p.L + 3) / 4, n_items = p.B * items_per_row;
  const int64_t per_block = (n_items + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * per_block, end = begin + per_block < n_items ? begin + per_block : n_items;
  const uint64_t seed = static_cast<uint64_t>(*p.seed);

  int64_t masked = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) masked += mask_item(p, item_of(i, items_per_row), seed);
  masked = block_sum<kThreads>(masked, shared.sum);
  if (threadIdx.x == 0) p.block_counts[blockIdx.x] = masked;
  cooperative_groups::this_grid().sync();

  int64_t before = 0, total = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    const int64_t count = p.block_counts[b];
    before += b < blockIdx.x ? count : 0;
    total += count;
  }
  before = block_sum<kThreads>(before, shared.sum);
  total = block_sum<kThreads>(total, shared.sum);
  for (int64_t first = begin; first < end; first += kThreads) {  // uniform over the block: the scan has barriers
    const int64_t i = first + threadIdx.x;
    const Item item = item_of(i, items_per_row);
    int chunk_total;
    const int slot = block_exclusive_scan<kThreads>(i < end ? count_item(p, item) : 0, shared.scan, chunk_total);
    if (i < end) write_item(p, item, before + slot);
    before += chunk_total;
  }
  write_counts(p);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = total + int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.B * p.L; i += stride)
    p.positions[i] = -1;
}

}  // namespace

cudaError_t launch_mask_tokens(const MaskTokensParams& p, cudaStream_t stream) {
  int device = 0, n_sm = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const KernelPlan plan = plan_mask_tokens(p.B, p.L, p.maskable != nullptr, p.p_by_token, n_sm);
  return launch_cooperative(mask_tokens_kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(plan.block), 0, stream, p);
}

}  // namespace diffullama
