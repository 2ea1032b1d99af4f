// SPDX-License-Identifier: Apache-2.0
// Making, packing and unpacking mask words on CUDA.
//   annealed_mask  : a warp takes 32 (or 4 x 32) consecutive words of a row, a block 8 rows. Words below the diagonal
//                    are stored as ones; the others draw their planes from the highest down, four a Philox call, until
//                    no bit of the warp's 32 words is open: 3.2 calls on average where the threshold has 8 groups of
//                    planes (a bit stays open with probability 1/2 a plane), none below its lowest set bit. Traffic: 4
//                    B a word written, 128 B a warp and store. Bound: integer issue, 18 multiplies and 28 logical ops
//                    a call
//   pack, unpack   : flat where rows are whole words and tensors aligned: 16 bools a thread and access (16 B), 4 in
//                    flight; otherwise a warp takes 32 words of a row, one bool a lane, by votes. Bound: memory
//   id_mask        : a block keeps 1024 keys in shared memory for 64 rows; a vote is a word. Bound: issue, about 5 a
//                    word and warp
//   int64          : every offset
// Not yet measured on GPU.
#include "attention_mask_kernel.h"

#include "../common/launch.h"
#include "../common/simt.cuh"
#include "attention_mask_math.h"
#include "attention_mask_plan.h"

namespace diffullama {
namespace {

constexpr int kThreads = kMaskThreads, kWarps = kMaskWarps;

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }
// Of the kernels whose warps take a row each.
__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * kWarps + warp_id(); }

// --- bools and words

// Bit k of the result is bool k of the four in a word, and the reverse. 0x204081 puts the four bits at 21 to 24, with
// no carry into them; the other way it puts bit k at 8 k.
__device__ __forceinline__ uint32_t pack4(uint32_t bools) { return bools * 0x00204081u >> 21 & 0xfu; }
__device__ __forceinline__ uint32_t unpack4(uint32_t bits) { return (bits & 0xfu) * 0x00204081u & 0x01010101u; }

__device__ __forceinline__ uint32_t pack16(uint4 bools) {
  return pack4(bools.x) | pack4(bools.y) << 4 | pack4(bools.z) << 8 | pack4(bools.w) << 12;
}

// n groups of 16 keys; group i is half word i.
__global__ void __launch_bounds__(kThreads) pack_mask_flat_kernel(const uint4* allowed, uint16_t* halves, int64_t n) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kFlatPerThread) + threadIdx.x;
  uint4 bools[kFlatPerThread];
#pragma unroll
  for (int k = 0; k < kFlatPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    bools[k] = i < n ? __ldg(allowed + i) : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int k = 0; k < kFlatPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < n) halves[i] = static_cast<uint16_t>(pack16(bools[k]));
  }
}

__global__ void __launch_bounds__(kThreads) unpack_mask_flat_kernel(const uint16_t* halves, uint4* allowed, int64_t n) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kFlatPerThread) + threadIdx.x;
  uint32_t bits[kFlatPerThread];
#pragma unroll
  for (int k = 0; k < kFlatPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    bits[k] = i < n ? __ldg(halves + i) : 0u;
  }
#pragma unroll
  for (int k = 0; k < kFlatPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < n) {
      allowed[i] = {unpack4(bits[k]), unpack4(bits[k] >> 4), unpack4(bits[k] >> 8), unpack4(bits[k] >> 12)};
    }
  }
}

constexpr int kRowLoads = 8;  // in flight a lane; divides 32

__global__ void __launch_bounds__(kThreads) pack_mask_rows_kernel(PackMaskParams p) {
  const int64_t row = row_of_warp(), n_words = words_per_row(p.Lk);
  if (row >= p.M * p.Lq) return;
  const uint8_t* const bools = p.allowed + row * p.Lk;
  for (int64_t chunk = blockIdx.y; 32 * chunk < n_words; chunk += gridDim.y) {
    uint32_t word = 0;
    for (int first = 0; first < 32 && 32 * chunk + first < n_words; first += kRowLoads) {
      uint8_t value[kRowLoads];
#pragma unroll
      for (int k = 0; k < kRowLoads; ++k) {
        const int64_t key = 32 * (32 * chunk + first + k) + lane_id();
        value[k] = key < p.Lk ? __ldg(bools + key) : uint8_t{0};
      }
#pragma unroll
      for (int k = 0; k < kRowLoads; ++k) {
        const uint32_t bits = __ballot_sync(kAllLanes, value[k]);
        if (lane_id() == first + k) word = bits;
      }
    }
    const int64_t w = 32 * chunk + lane_id();
    if (w < n_words) p.words[row * n_words + w] = word;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_mask_rows_kernel(UnpackMaskParams p) {
  const int64_t row = row_of_warp(), n_words = words_per_row(p.Lk);
  if (row >= p.M * p.Lq) return;
  for (int64_t chunk = blockIdx.y; 32 * chunk < n_words; chunk += gridDim.y) {
    const int64_t w = 32 * chunk + lane_id();
    const uint32_t word = w < n_words ? __ldg(p.words + row * n_words + w) : 0u;
    for (int k = 0; k < 32; ++k) {
      const uint32_t bits = __shfl_sync(kAllLanes, word, k);
      const int64_t key = 32 * (32 * chunk + k) + lane_id();
      if (key < p.Lk) p.allowed[row * p.Lk + key] = bits >> lane_id() & 1u;
    }
  }
}

// --- words from ids

struct IdShared {
  int64_t keys[kIdKeys];
};

constexpr int kIdRowsPerWarp = 4;  // that share a read of shared memory

template <bool kExact>
__global__ void __launch_bounds__(kThreads) id_mask_kernel(IdMaskParams p) {
  IdShared& shared = static_shared<IdShared>();
  const int64_t n_words = words_per_row(p.Lk), row_blocks = (p.Lq + kIdRows - 1) / kIdRows;
  const int64_t m = blockIdx.x / row_blocks, first_row = blockIdx.x % row_blocks * kIdRows;
  const int64_t* const key_ids = p.key_ids + m * p.Lk;
  for (int64_t chunk = blockIdx.y; 32 * chunk < n_words; chunk += gridDim.y) {
    __syncthreads();  // the keys may still be read
    for (int k = threadIdx.x; k < kIdKeys; k += kThreads) {
      const int64_t key = kIdKeys * chunk + k;
      shared.keys[k] = key < p.Lk ? __ldg(key_ids + key) : 0;
    }
    __syncthreads();
    const int64_t w = 32 * chunk + lane_id();
    for (int first = warp_id() * kIdRowsPerWarp; first < kIdRows; first += kWarps * kIdRowsPerWarp) {
      int64_t query[kIdRowsPerWarp];
      uint32_t word[kIdRowsPerWarp] = {};
#pragma unroll
      for (int r = 0; r < kIdRowsPerWarp; ++r) {
        const int64_t q = first_row + first + r;
        query[r] = q < p.Lq ? __ldg(p.query_ids + m * p.Lq + q) : 0;
      }
#pragma unroll 8
      for (int k = 0; k < 32; ++k) {
        const int64_t key = shared.keys[32 * k + lane_id()];
#pragma unroll
        for (int r = 0; r < kIdRowsPerWarp; ++r) {
          const uint32_t bits = __ballot_sync(kAllLanes, allows(query[r], key, kExact));
          if (lane_id() == k) word[r] = bits;
        }
      }
#pragma unroll
      for (int r = 0; r < kIdRowsPerWarp; ++r) {
        const int64_t q = first_row + first + r;
        if (q < p.Lq && w < n_words) p.words[(m * p.Lq + q) * n_words + w] = word[r] & bits_up_to(p.Lk - 1, w);
      }
    }
  }
}

// --- annealed words

struct AnnealedShared {
  alignas(16) uint32_t set[32];  // all ones where the threshold has this plane's bit
};

struct AnnealedKey {
  uint64_t seed, threshold;
  uint32_t stream;
  int lowest_group;  // of four planes, that holds the threshold's lowest set bit; 8 where nothing is to be drawn
};

// The drawn bits of word w of row i among those that are open. All lanes of the warp call.
__device__ __forceinline__ uint32_t draw_word(const AnnealedShared& shared, const AnnealedKey& key, int i, int w,
                                              uint32_t open) {
  if (key.threshold >= kCertain) return open;
  uint32_t drawn = 0;
  for (int group = 7; group >= key.lowest_group && __any_sync(kAllLanes, open != 0); --group) {
    const Words4 planes = philox(key.seed, plane_index4(i, w, 4 * group), Tag::kAttentionMask, key.stream);
    const uint4 set = *reinterpret_cast<const uint4*>(shared.set + 4 * group);
    settle_plane(drawn, open, planes.w[3], set.w);
    settle_plane(drawn, open, planes.w[2], set.z);
    settle_plane(drawn, open, planes.w[1], set.y);
    settle_plane(drawn, open, planes.w[0], set.x);
  }
  return drawn & ~open;
}

// Lengths are below 2^31, so word indices of a row are int.
template <int kSteps>
__global__ void __launch_bounds__(kThreads) annealed_mask_kernel(AnnealedMaskParams p) {
  AnnealedShared& shared = static_shared<AnnealedShared>();
  AnnealedKey key;
  key.threshold = threshold32(__ldg(p.attn_mask_ratio));
  key.seed = static_cast<uint64_t>(__ldg(p.seed));
  key.stream = static_cast<uint32_t>(__ldg(p.step));
  const bool drawn = key.threshold > 0 && key.threshold < kCertain;
  key.lowest_group = drawn ? (__ffsll(static_cast<long long>(key.threshold)) - 1) / 4 : 8;
  if (threadIdx.x < 32) shared.set[threadIdx.x] = key.threshold >> threadIdx.x & 1 ? kAllLanes : 0u;
  __syncthreads();

  if (row_of_warp() >= p.length) return;
  const int i = static_cast<int>(row_of_warp()), n_words = static_cast<int>(words_per_row(p.length));
  const int n_chunks = (n_words + kSteps * kWarp - 1) / (kSteps * kWarp);
  const int whole_words = static_cast<int>(p.length / 32);
  uint32_t* const words = p.words + int64_t{i} * n_words;
  for (int chunk = n_chunks - 1 - static_cast<int>(blockIdx.y); chunk >= 0; chunk -= gridDim.y) {
    for (int step = 0; step < kSteps; ++step) {
      const int first = (chunk * kSteps + step) * kWarp, w = first + lane_id();
      if (first >= n_words) break;
      uint32_t word = kAllLanes;  // below the diagonal
      if (first + kWarp > (i + 1) / 32) {
        uint32_t causal = 0, open = kAllLanes;
        if (first <= i / 32 || first + kWarp > whole_words) {  // the diagonal or the end of the row is in these words
          causal = bits_up_to(i, w);
          open = bits_up_to(p.length - 1, w) & ~causal;
        }
        word = causal | draw_word(shared, key, i, w, open);
      }
      if (w < n_words) words[w] = word;
    }
  }
}

// --- launches

dim3 dim(MaskGrid grid) { return dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)); }

bool is_flat(const uint8_t* allowed, int64_t k_length) {
  return k_length % 32 == 0 && reinterpret_cast<uintptr_t>(allowed) % 16 == 0;
}

}  // namespace

cudaError_t launch_pack_mask(const PackMaskParams& p, cudaStream_t stream) {
  const bool flat = is_flat(p.allowed, p.Lk);
  const dim3 grid = dim(bool_mask_grid(p.M, p.Lq, p.Lk, flat)), block(kThreads);
  if (!flat) return launch(pack_mask_rows_kernel, grid, block, 0, stream, p);
  return launch(pack_mask_flat_kernel, grid, block, 0, stream, reinterpret_cast<const uint4*>(p.allowed),
                reinterpret_cast<uint16_t*>(p.words), p.M * p.Lq * (p.Lk / kFlatKeys));
}

cudaError_t launch_unpack_mask(const UnpackMaskParams& p, cudaStream_t stream) {
  const bool flat = is_flat(p.allowed, p.Lk);
  const dim3 grid = dim(bool_mask_grid(p.M, p.Lq, p.Lk, flat)), block(kThreads);
  if (!flat) return launch(unpack_mask_rows_kernel, grid, block, 0, stream, p);
  return launch(unpack_mask_flat_kernel, grid, block, 0, stream, reinterpret_cast<const uint16_t*>(p.words),
                reinterpret_cast<uint4*>(p.allowed), p.M * p.Lq * (p.Lk / kFlatKeys));
}

cudaError_t launch_id_mask(const IdMaskParams& p, cudaStream_t stream) {
  const dim3 grid = dim(id_mask_grid(p.M, p.Lq, p.Lk)), block(kThreads);
  return launch(p.exact ? id_mask_kernel<true> : id_mask_kernel<false>, grid, block, 0, stream, p);
}

cudaError_t launch_annealed_mask(const AnnealedMaskParams& p, cudaStream_t stream) {
  const auto kernel = annealed_steps(p.length) == 1 ? annealed_mask_kernel<1> : annealed_mask_kernel<kAnnealedSteps>;
  return launch(kernel, dim(annealed_mask_grid(p.length)), dim3(kThreads), 0, stream, p);
}

}  // namespace diffullama
