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

// Of 64 keys, for one thread of the backward, whose accumulators are transposed: rows are keys.
struct KeyFragmentBits {
  const uint32_t* fragments;  // of the keys and the thread, two words a tile of 128 queries; or null
  uint32_t keys;              // what the last key and padding leave of any word
  int key;                    // of row r = 0
  bool causal;

  __device__ KeyFragmentBits(const MaskFragments& all, const SequenceMask& mask, int k0)
      : fragments(nullptr), keys(0), key(k0 + fragment_row(threadIdx.x % kWarpgroup)), causal(mask.p.causal) {
    constexpr uint32_t kRow0 = 0x33333333u;  // the bits of r = 0
    if (allows_key(mask, key)) keys |= kRow0;
    if (allows_key(mask, key + 8)) keys |= ~kRow0;
    if (all.data == nullptr) return;
    const int n_query_tiles = (mask.Lq + kFragmentColumns - 1) / kFragmentColumns;
    const int64_t row_of_tiles = int64_t{k0 / kFragmentRows} * n_query_tiles;
    fragments = all.data + mask.b * all.batch +
                (row_of_tiles * kFragmentThreads + static_cast<int>(threadIdx.x) % kWarpgroup) * 2;
  }

  // Of the tile's queries, 64 a word; its class is kBits.
  template <int kWords>
  __device__ __forceinline__ void tile(uint32_t (&bits)[kWords], int q0) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = q0 / kPanel + i;
      bits[i] = keys;
      if (fragments != nullptr) bits[i] &= __ldg(fragments + int64_t{word / 2} * (2 * kFragmentThreads) + word % 2);
      if (causal) bits[i] &= from_key(2 * word) | from_key(2 * word + 1) << 16;
    }
  }

 private:
  static __device__ __forceinline__ bool allows_key(const SequenceMask& mask, int key) {
    return key < mask.Lk && (mask.p.key_words == nullptr || (mask.key_word(key / 32) >> key % 32 & 1u));
  }
  // Of queries [32 w, 32 w + 32): those that are not before the key.
  __device__ __forceinline__ uint32_t from_key(int w) const {
    return fragment_bits(bits_from(key - 32 * w), bits_from(key + 8 - 32 * w), lane_of() % 4);
  }
  static __device__ __forceinline__ uint32_t bits_from(int first) {
    return first >= 32 ? 0u : 0xffffffffu << max(first, 0);
  }
};

// Scores of the queries [64 half, 64 half + 64) to -inf where the word's bit is 0.
template <int kN>
__device__ __forceinline__ void forbid_half(float (&s)[kN][4], int half, uint32_t word) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[8 * half + n][i] = word & (1u << (4 * n + i)) ? s[8 * half + n][i] : -INFINITY;
  }
}

// Scores [64, 128] to -inf where the fragment's bit is 0.
__device__ __forceinline__ void forbid_fragment(float (&s)[16][4], uint2 bits) {
  forbid_half(s, 0, bits.x);
  forbid_half(s, 1, bits.y);
}

}  // namespace diffullama
