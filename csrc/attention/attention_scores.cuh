// SPDX-License-Identifier: Apache-2.0
// The mask inside the attention kernels: which tiles to visit, and their bits on accumulators; device only.
//
// Whatever forbids an entry (words, causal order, padding, the last key) ends in one 32-bit word a row and 32 columns.
// A lane keeps those of one row; the thread that holds an accumulator gets them by a shuffle. A bit's place is then
// known to the compiler, which turns eight tests into predicates at once (R2P) where the test is written as below.
#pragma once

#include <cmath>

#include "../attention_mask/attention_mask_math.h"
#include "../attention_mask/mask_warp.cuh"
#include "attention_tile.cuh"

namespace diffullama {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Scores times this are exponents of 2. Never 0: -inf times it must stay -inf.
__device__ __forceinline__ float log2_scale(float scale) { return fmaxf(scale * kLog2e, 1.17549435e-38f); }

// The mask of sequence b. Pointers are made where they are used: registers are what these kernels are short of.
struct SequenceMask {
  const AttentionMaskParams& p;
  int b, Lq, Lk;

  // Of keys [32 w, 32 w + 32).
  __device__ __forceinline__ uint32_t key_word(int w) const { return __ldg(p.key_words + b * words_per_row(Lk) + w); }

  // Bits of keys [32 w, 32 w + 32) for a query.
  __device__ __forceinline__ uint32_t word(int query, int w) const {
    const int n_words = (Lk + 31) / 32;
    if (query >= Lq || w >= n_words) return 0;
    uint32_t bits = bits_up_to(p.causal ? min(query, Lk - 1) : Lk - 1, w);
    if (p.words) bits &= __ldg(p.words + b * p.words_batch + int64_t{query} * n_words + w);
    if (p.key_words) bits &= key_word(w);
    return bits;
  }

  // What the entries [q0, q0 + kQ) x [k0, k0 + kK) hold, the same for every thread: kBits where not known better.
  template <int kQ, int kK>
  __device__ __forceinline__ TileClass tile(int q0, int k0) const {
    const int q1 = min(q0 + kQ, Lq), k1 = min(k0 + kK, Lk);
    if (p.causal && k0 >= q1) return TileClass::kNothing;
    bool everything = k0 + kK <= Lk && !(p.causal && k1 - 1 > q0);
    if (p.key_words) {
      bool any = false;
      for (int w = k0 / 32; 32 * w < k1; ++w) {
        const uint32_t bits = key_word(w);
        any |= bits != 0;
        everything &= bits == ~0u;
      }
      if (!any) return TileClass::kNothing;
    }
    if (p.classes) {
      const int n_columns = (Lk + kClassTile - 1) / kClassTile;
      bool any = false;
      for (int i = q0 / kClassTile; i * kClassTile < q1; ++i) {
        for (int j = k0 / kClassTile; j * kClassTile < k1; ++j) {
          const uint8_t found = __ldg(p.classes + b * p.classes_batch + int64_t{i} * n_columns + j);
          any |= static_cast<TileClass>(found) != TileClass::kNothing;
          everything &= static_cast<TileClass>(found) == TileClass::kEverything;
        }
      }
      if (!any) return TileClass::kNothing;
    } else if (p.words) {
      everything = false;
    }
    return everything ? TileClass::kEverything : TileClass::kBits;
  }
};

// The numbers [at, end) whose class_of is not kNothing, in order.
template <class ClassOf>
struct TileWalk {
  int at, end;
  ClassOf class_of;
  TileClass held = TileClass::kNothing;

  __device__ __forceinline__ TileWalk(int begin, int end, ClassOf class_of)
      : at(begin - 1), end(end), class_of(class_of) {
    next();
  }
  __device__ __forceinline__ bool done() const { return at >= end; }
  __device__ __forceinline__ void next() {
    do {
      ++at;
      if (done()) return;
      held = class_of(at);
    } while (held == TileClass::kNothing);
  }
};

// Scores [16 kM, 8 kN] to -inf where forbidden; lane `first_lane + row` keeps the words of a row.
template <int kM, int kN>
__device__ __forceinline__ void forbid(float (&scores)[kM][kN][4], const uint32_t (&words)[kN / 4], int first_lane) {
  const int g = lane_of() / 4, shift = 2 * (lane_of() % 4);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kN / 4; ++j) {
        const uint32_t bits = __shfl_sync(kAllLanes, words[j], first_lane + 16 * m + 8 * r + g) >> shift;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float (&s)[4] = scores[m][4 * j + n];
          s[2 * r] = bits & (1u << (8 * n)) ? s[2 * r] : -INFINITY;
          s[2 * r + 1] = bits & (1u << (8 * n + 1)) ? s[2 * r + 1] : -INFINITY;
        }
      }
    }
  }
}

}  // namespace diffullama
