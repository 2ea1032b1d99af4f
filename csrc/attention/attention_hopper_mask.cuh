// SPDX-License-Identifier: Apache-2.0
// The mask on the accumulators of the sm_90a attention kernels: a bit each, in their order (fragment_mask).
#pragma once

#include "../common/hopper.cuh"
#include "attention_hopper_kernel.h"
#include "attention_scores.cuh"

namespace diffullama {

// Of 64 queries, for one thread.
struct FragmentBits {
  SequenceMask mask;
  const uint2* fragments;  // of the queries and the thread, one a tile of keys; or null
  int query;               // of row r = 0

  __device__ FragmentBits(const MaskFragments& all, const SequenceMask& mask, int q0)
      : mask(mask), fragments(nullptr), query(q0 + fragment_row(threadIdx.x % kWarpgroup)) {
    if (all.data == nullptr) return;
    const int n_key_tiles = (mask.Lk + kFragmentColumns - 1) / kFragmentColumns;
    const int64_t row_of_tiles = int64_t{q0 / kFragmentRows} * n_key_tiles;
    fragments = reinterpret_cast<const uint2*>(all.data + mask.b * all.batch) + row_of_tiles * kFragmentThreads +
                threadIdx.x % kWarpgroup;
  }

  // The fragment of a tile of class kBits.
  __device__ __forceinline__ uint2 tile(int key_tile) const {
    uint2 bits{~0u, ~0u};
    if (fragments != nullptr) {
      bits = __ldg(fragments + int64_t{key_tile} * kFragmentThreads);
      if (!mask.p.causal && mask.p.key_words == nullptr) return bits;
    }
    const int w = key_tile * kFragmentTileWords;
    bits.x &= by_rule(w) | by_rule(w + 1) << 16;
    bits.y &= by_rule(w + 2) | by_rule(w + 3) << 16;
    return bits;
  }

 private:
  // What the mask has beside words, for the keys of word w.
  __device__ __forceinline__ uint32_t by_rule(int w) const {
    return fragment_bits(word(query, w), word(query + 8, w), lane_of() % 4);
  }
  __device__ __forceinline__ uint32_t word(int of_query, int w) const {
    const uint32_t bits = bits_up_to(mask.p.causal ? min(of_query, mask.Lk - 1) : mask.Lk - 1, w);
    return bits != 0 && mask.p.key_words != nullptr ? bits & mask.key_word(w) : bits;
  }
};

// Scores [64, 128] to -inf where the fragment's bit is 0.
__device__ __forceinline__ void forbid_fragment(float (&s)[16][4], uint2 bits) {
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const uint32_t word = n < 8 ? bits.x : bits.y;
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = word & (1u << (4 * n + i) % 32) ? s[n][i] : -INFINITY;
  }
}

}  // namespace diffullama
