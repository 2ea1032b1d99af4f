// SPDX-License-Identifier: Apache-2.0
// A block's slice of one row of logits for token_stats: from global into shared memory once, or read again by every
// pass. Chunks start at multiples of 8 entries of the row, wherever its first byte lies: sums over a chunk round alike
// for any alignment and any number of blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <type_traits>

#include "../common/tensor_core.cuh"
#include "token_stats_plan.h"
#include "unmasking_math.h"

namespace diffullama::token_stats {

// --- chunks: 8 entries in one or two pieces of 16 bytes

template <class T>
constexpr int kPieces = sizeof(T) * kChunk / 16;
template <class T>
constexpr int kPerPiece = 16 / sizeof(T);

template <class T>
struct Chunk {
  uint4 pieces[kPieces<T>];
};

// Two 16-bit entries; not of float.
template <class T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <class T>
__device__ __forceinline__ Pair<T> pair_of(const Chunk<T>& chunk, int i) {
  const uint32_t words[4] = {chunk.pieces[0].x, chunk.pieces[0].y, chunk.pieces[0].z, chunk.pieces[0].w};
  Pair<T> pair;
  memcpy(&pair, &words[i], sizeof pair);
  return pair;
}

__device__ __forceinline__ void unpack(const Chunk<float>& chunk, float (&x)[kChunk]) { memcpy(x, &chunk, sizeof x); }

__device__ __forceinline__ void unpack(const Chunk<__half>& chunk, float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const float2 both = __half22float2(pair_of(chunk, i));
    x[2 * i] = both.x;
    x[2 * i + 1] = both.y;
  }
}

__device__ __forceinline__ void unpack(const Chunk<__nv_bfloat16>& chunk, float (&x)[kChunk]) {
  const uint4& p = chunk.pieces[0];
  const uint32_t words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <class T>
__device__ __forceinline__ T minus_infinity() {
  return static_cast<T>(-INFINITY);
}

// --- pieces of a row in global memory

// The 16 bytes from `shift` on of low and high; shift is in 1 ... 15 and a multiple of 2.
__device__ __forceinline__ uint4 shifted(uint4 low, uint4 high, unsigned shift) {
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const unsigned bits = 8 * (shift & 3);
  return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                    __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

// One row of V entries at any alignment of T.
template <class T>
struct GlobalRow {
  const T* x;
  int V;

  __device__ __forceinline__ unsigned shift() const { return reinterpret_cast<uintptr_t>(x) % 16; }

  // Whether the chunk from entry `first` on can be loaded by aligned 16-byte loads that stay in the row.
  __device__ __forceinline__ bool is_inside(int first) const {
    return shift() == 0 ? first + kChunk <= V : first > 0 && first + kChunk + kPerPiece<T> <= V;
  }

  // The aligned pieces that hold it: one more than it has, where the row is not aligned.
  __device__ __forceinline__ const uint4* aligned_pieces(int first) const {
    return reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(x + first) - shift());
  }

  // At the ends of the row: entry by entry, -inf past its end.
  __device__ Chunk<T> load_at_end(int first) const {
    T values[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = first + i < V ? x[first + i] : minus_infinity<T>();
    Chunk<T> chunk;
    memcpy(&chunk, values, sizeof chunk);
    return chunk;
  }

  __device__ __forceinline__ Chunk<T> load(int first) const {
    if (!is_inside(first)) return load_at_end(first);
    Chunk<T> chunk;
    const uint4* from = aligned_pieces(first);
    uint4 low = __ldg(from);
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      const uint4 high = shift() == 0 && i + 1 == kPieces<T> ? low : __ldg(from + i + 1);
      chunk.pieces[i] = shift() == 0 ? low : shifted(low, high, shift());
      low = high;
    }
    return chunk;
  }
};

// --- the slice

// Which chunks of the slice belong to a lane: first, first + 32, ... below end. Every pass goes through the same ones.
struct LaneChunks {
  int first, end;

  __device__ __forceinline__ bool has(int c) const { return c >= first && c < end && (c - first) % kWarp == 0; }
};

template <class T, bool kResident>
struct Slice {
  GlobalRow<T> row;
  T* resident;  // [kChunk * chunks] in shared memory, where kResident
  int begin;    // first entry
  int chunks;   // -inf fills the last one up
  int forbid;   // negative is none

  __device__ __forceinline__ Chunk<T> chunk(int c) const {
    if constexpr (kResident) {
      return reinterpret_cast<const Chunk<T>*>(resident)[c];
    } else {
      const int first = begin + kChunk * c;
      Chunk<T> chunk = row.load(first);
      if (static_cast<unsigned>(forbid - first) < unsigned{kChunk}) forbid_in(chunk, forbid - first);
      return chunk;
    }
  }

  // Entry i of the slice.
  __device__ __forceinline__ float value(int i) const {
    if constexpr (kResident) {
      return static_cast<float>(resident[i]);
    } else {
      return begin + i == forbid || begin + i >= row.V ? -INFINITY : static_cast<float>(row.x[begin + i]);
    }
  }

  // Fills `resident`; a lane may then read its own chunks, other lanes after a barrier.
  __device__ __forceinline__ void stage(LaneChunks own) const {
    auto* to = reinterpret_cast<Chunk<T>*>(resident);
    if (row.shift() == 0) {
      stage_aligned(own, to);
    } else {
      stage_shifted(own, to);
    }
#pragma unroll 1
    for (int end = 0; end < 3; ++end) {  // the chunks that may hold an end of the row
      const int c = end == 0 ? 0 : chunks - end;
      if (own.has(c) && !row.is_inside(begin + kChunk * c)) to[c] = row.load_at_end(begin + kChunk * c);
    }
    cp_async_wait<0>();
    if (forbid >= begin && own.has((forbid - begin) / kChunk)) resident[forbid - begin] = minus_infinity<T>();
  }

 private:
  __device__ __forceinline__ void stage_aligned(LaneChunks own, Chunk<T>* to) const {
    const int end = min(own.end, (row.V - begin) / kChunk);
    const auto* from = reinterpret_cast<const Chunk<T>*>(row.x + begin);
#pragma unroll 4
    for (int c = own.first; c < end; c += kWarp) {
#pragma unroll
      for (int i = 0; i < kPieces<T>; ++i) cp_async<16>(&to[c].pieces[i], &from[c].pieces[i]);
    }
    cp_async_commit();
  }

  // Through registers, several loads in flight.
  __device__ __forceinline__ void stage_shifted(LaneChunks own, Chunk<T>* to) const {
    constexpr int kAtOnce = 4 / kPieces<T>;
    for (int first = own.first; first < own.end; first += kAtOnce * kWarp) {
      uint4 pieces[kAtOnce][kPieces<T> + 1];
      bool inside[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int c = first + k * kWarp, entry = begin + kChunk * c;
        inside[k] = c < own.end && row.is_inside(entry);
#pragma unroll
        for (int i = 0; i <= kPieces<T>; ++i) {
          if (inside[k]) pieces[k][i] = __ldg(row.aligned_pieces(entry) + i);
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
        for (int i = 0; i < kPieces<T>; ++i) {
          if (inside[k]) to[first + k * kWarp].pieces[i] = shifted(pieces[k][i], pieces[k][i + 1], row.shift());
        }
      }
    }
  }

  static __device__ void forbid_in(Chunk<T>& chunk, int place) {
    T values[kChunk];
    memcpy(values, &chunk, sizeof values);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = i == place ? minus_infinity<T>() : values[i];
    memcpy(&chunk, values, sizeof values);
  }
};

// --- the largest entry of some chunks; NaN beats all

// Ranks of values as integers: smaller is larger; 0 is NaN. Zeros of either sign are alike.
__device__ __forceinline__ uint32_t rank_bits(float x) { return x == x ? confidence_bits(x) : 0u; }
__device__ __forceinline__ float value_of_bits(uint32_t bits) { return bits == 0 ? NAN : confidence_of(bits); }

template <class T>
class Largest {
 public:
  __device__ __forceinline__ void add(const Chunk<T>& chunk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs_[i % 2] = __hmax2_nan(pairs_[i % 2], pair_of(chunk, i));
  }
  __device__ __forceinline__ uint32_t bits() const {
    const Pair<T> pair = __hmax2_nan(pairs_[0], pairs_[1]);
    return min(rank_bits(__low2float(pair)), rank_bits(__high2float(pair)));
  }

 private:
  Pair<T> pairs_[2] = {{minus_infinity<T>(), minus_infinity<T>()}, {minus_infinity<T>(), minus_infinity<T>()}};
};

template <>
class Largest<float> {
 public:
  __device__ __forceinline__ void add(const Chunk<float>& chunk) {
    float x[kChunk];
    unpack(chunk, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      largest_ = fmaxf(largest_, x[i]);
      has_nan_ |= x[i] != x[i];
    }
  }
  __device__ __forceinline__ uint32_t bits() const { return has_nan_ ? 0u : rank_bits(largest_); }

 private:
  float largest_ = -INFINITY;
  bool has_nan_ = false;
};

}  // namespace diffullama::token_stats
