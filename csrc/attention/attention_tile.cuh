// SPDX-License-Identifier: Apache-2.0
// Tiles of 16-bit elements in shared memory and their products on tensor cores; device only.
//
// A tile is [rows, D]. Its 16-byte chunks are swizzled so that eight neighbouring rows of one chunk, which ldmatrix
// reads together, lie in eight different groups of four banks, and copies of a row write no bank twice: rows of a
// multiple of 128 bytes by the row's number modulo 8; rows of 64 or 192 bytes, which already start in two
// alternating places, by half of it modulo 4; rows of 32 bytes by a quarter of it modulo 2.
#pragma once

#include <cstring>

#include "../common/tensor_core.cuh"
#include "attention_kernel.h"

namespace diffullama {

__device__ __forceinline__ int lane_of() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / kWarp; }

// The same number, which the compiler must not know: what depends on it is computed where it is used and not kept in
// registers for the kernel's life.
__device__ __forceinline__ int unknown(int v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// Element at which a chunk of a row begins.
template <int D>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kChunks = D / 8;
  static_assert(kChunks % 4 == 0 || kChunks == 2, "a row is 32 bytes or a multiple of 64");
  const int key = kChunks % 8 == 0 ? row % 8 : kChunks == 2 ? row / 4 % 2 : row / 2 % 4;
  return (row * kChunks + (chunk ^ key)) * 8;
}

// --- dispatch, on the host

template <class T>
struct ElementType {
  using type = T;
};

// Calls f(ElementType<T>, integral_constant<int, D>) for the type and width of the operands.
template <class F>
cudaError_t with_attention_type(int D, bool is_half, F&& f) {
  const auto with_width = [&](auto type) {
    switch (D) {
      case 32:
        return f(type, std::integral_constant<int, 32>{});
      case 64:
        return f(type, std::integral_constant<int, 64>{});
      case 96:
        return f(type, std::integral_constant<int, 96>{});
      case 128:
        return f(type, std::integral_constant<int, 128>{});
      case 256:
        return f(type, std::integral_constant<int, 256>{});
      default:
        return cudaErrorInvalidValue;
    }
  };
  return is_half ? with_width(ElementType<__half>{}) : with_width(ElementType<__nv_bfloat16>{});
}

// --- global memory to shared and back

// First element of a row of one head.
template <class T>
__device__ __forceinline__ const T* row_of(const AttentionOperand& operand, int b, int head, int row) {
  return static_cast<const T*>(operand.data) + b * operand.batch + head * operand.head + row * operand.row;
}

// Starts copying kRows rows, of which the first n_rows exist (at least one) and the others become zeros.
template <int kRows, int D, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* rows, int64_t stride, int n_rows) {
  constexpr int kChunks = D / 8, kCopies = kRows * kChunks / kAttentionThreads;
  static_assert(kCopies * kAttentionThreads == kRows * kChunks, "every thread copies as much");
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kAttentionThreads % kChunks == 0) {  // a thread stays in its column of chunks
    constexpr int kStep = kAttentionThreads / kChunks;
    const int first = thread / kChunks, chunk = thread % kChunks;
    const T* from = rows + first * stride + 8 * chunk;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int row = first + k * kStep;
      cp_async<16>(tile + swizzled<D>(row, chunk), row < n_rows ? from : rows, row < n_rows ? 16 : 0);
      from += kStep * stride;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int i = thread + k * kAttentionThreads, row = i / kChunks, chunk = i % kChunks;
      const T* const from = rows + (row < n_rows ? row : 0) * stride + 8 * chunk;
      cp_async<16>(tile + swizzled<D>(row, chunk), from, row < n_rows ? 16 : 0);
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&packed, &pair, sizeof packed);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&packed, &pair, sizeof packed);
  }
  return packed;
}

// The quad's four threads exchange x[j] of thread q for x[q] of thread j.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&x)[4]) {
  const int q = lane_of() % 4;
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & d) continue;
      const uint32_t got = __shfl_xor_sync(kAllLanes, q & d ? x[j] : x[j + d], d);
      x[j] = q & d ? got : x[j];
      x[j + d] = q & d ? x[j + d] : got;
    }
  }
}

// The warp's accumulators [16 kM, D] to the first n_rows of its rows in global memory, rows of D elements, through its
// own rows of a tile that it alone uses by now.
template <class T, int D, int kM>
__device__ __forceinline__ void store_rows(const float (&acc)[kM][D / 8][4], T* tile, int row0, T* to, int n_rows) {
  const int g = lane_of() / 4, pair = lane_of() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t packed = pack2<T>(acc[m][n][2 * r], acc[m][n][2 * r + 1]);
        memcpy(tile + swizzled<D>(row0 + 16 * m + 8 * r + g, n) + 2 * pair, &packed, sizeof packed);
      }
    }
  }
  __syncwarp();
  for (int i = lane_of(); i < 16 * kM * D / 8; i += kWarp) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    if (row < n_rows) {
      const auto* from = reinterpret_cast<const uint4*>(tile + swizzled<D>(row0 + row, chunk));
      *reinterpret_cast<uint4*>(to + int64_t{row} * D + 8 * chunk) = *from;
    }
  }
}

template <int kItem>
using Item = std::integral_constant<int, kItem>;

// A ring of kStages tiles [kRows, D], used one after the other.
template <class T, int kRows, int D, int kStages>
struct Ring {
  T* tiles;
  int place = 0;  // of the next tile to use

  __device__ __forceinline__ T* at(int i) const { return tiles + i * (kRows * D); }
  // The tile used `n` uses ago, which by now is free.
  __device__ __forceinline__ T* behind(int n) const { return at(place < n ? place - n + kStages : place - n); }
  __device__ __forceinline__ T* use() {
    T* const tile = at(place);
    place = place + 1 == kStages ? 0 : place + 1;
    return tile;
  }
  // The n-th tile from the next one on, where tiles are used in steps of several.
  __device__ __forceinline__ T* ahead(int n) const {
    const int i = place + n % kStages;
    return at(i < kStages ? i : i - kStages);
  }
  __device__ __forceinline__ void advance(int n) {
    n %= kStages;
    if (n != 0) place = place + n < kStages ? place + n : place + n - kStages;
  }
};

// --- fragments

// Rows [row0, row0 + 16), columns [16 k, 16 k + 16) as the left operand.
template <int D, class T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int row0, int k) {
  ldmatrix<4>(a, tile + swizzled<D>(row0 + lane_of() % 16, 2 * k + lane_of() / 16));
}

// Columns [16 m, 16 m + 16), rows [16 k, 16 k + 16) as the left operand: that of the transpose.
template <int D, class T>
__device__ __forceinline__ void load_left_transposed(uint32_t (&a)[4], const T* tile, int m, int k) {
  ldmatrix<4, true>(a, tile + swizzled<D>(16 * k + lane_of() % 8 + lane_of() / 16 * 8, 2 * m + lane_of() / 8 % 2));
}

// Rows [row0, row0 + 16), columns [16 k, 16 k + 16), transposed, as two right operands: b[0..1] and b[2..3] of 8 rows.
template <int D, class T>
__device__ __forceinline__ void load_right_transposed(uint32_t (&b)[4], const T* tile, int row0, int k) {
  ldmatrix<4>(b, tile + swizzled<D>(row0 + lane_of() % 8 + lane_of() / 16 * 8, 2 * k + lane_of() / 8 % 2));
}

// Rows [16 k, 16 k + 16), columns [16 n, 16 n + 16) as two right operands of 8 columns.
template <int D, class T>
__device__ __forceinline__ void load_right(uint32_t (&b)[4], const T* tile, int k, int n) {
  ldmatrix<4, true>(b, tile + swizzled<D>(16 * k + lane_of() % 16, 2 * n + lane_of() / 16));
}

// Accumulators as left operands of a product over their columns: a lane holds the very elements it needs.
template <class T, int kM, int kN>
__device__ __forceinline__ void as_left(uint32_t (&a)[kM][kN / 2][4], const float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&c)[4] = acc[m][2 * k + i / 2];
        a[m][k][i] = pack2<T>(c[i % 2 * 2], c[i % 2 * 2 + 1]);
      }
    }
  }
}

// --- products; accumulators [kM][columns / 8][4] of mma_m16n8k16, kM times 16 rows a warp

// acc = A B^T for rows [row0, row0 + 16 kM) of A [., D] and B [8 kN, D].
template <class T, int D, int kM, int kN>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kM][kN][4], const T* a_tile, int row0,
                                                    const T* b_tile) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
  }
  row0 = unknown(row0);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_left<D>(a[m], a_tile, row0 + 16 * m, k);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t b[4];
      load_right_transposed<D>(b, b_tile, 16 * n, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(acc[m][2 * n], a[m], {b[0], b[1]});
        mma_m16n8k16<T>(acc[m][2 * n + 1], a[m], {b[2], b[3]});
      }
    }
  }
}

// acc += A B for A [16 kM, 16 kK] in registers and B [16 kK, D].
template <class T, int D, int kM, int kK>
__device__ __forceinline__ void multiply_add(float (&acc)[kM][D / 8][4], const uint32_t (&a)[kM][kK][4],
                                             const T* b_tile) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_right<D>(b, b_tile, k, n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(acc[m][2 * n], a[m][k], {b[0], b[1]});
        mma_m16n8k16<T>(acc[m][2 * n + 1], a[m][k], {b[2], b[3]});
      }
    }
  }
}

}  // namespace diffullama
