// SPDX-License-Identifier: Apache-2.0
// A matrix product through cp.async, ldmatrix and mma.sync, and the bits that ldmatrix returns.
#include <cstdint>

#include "../../common/launch.h"
#include "../../common/tensor_core.cuh"

namespace diffullama {
namespace {

constexpr int kM = 32, kN = 16, kK = 32, kWarps = kM / 16;

template <class T>
struct alignas(16) Tiles {
  T a[2][kM][kK];
  T b[2][kK * kN];  // [kK, kN], or [kN, kK] where transposed
};

// Rows of kColumns elements to shared memory, 8 elements a copy.
template <int kRows, int kColumns, class T>
__device__ void load_tile(T* to, const T* from, int64_t row_stride) {
  for (int i = threadIdx.x; i < kRows * kColumns / 8; i += blockDim.x) {
    const int row = i / (kColumns / 8), column = 8 * (i % (kColumns / 8));
    cp_async<16>(to + row * kColumns + column, from + row * row_stride + column);
  }
}

// c [M, N] float = a [M, K] b; b is [K, N], or [N, K] where kTransposed. Sizes are multiples of the tile's. Two stages.
template <class T, bool kTransposed>
__global__ void product_kernel(const T* a, const T* b, float* c, int N, int K) {
  Tiles<T>& tiles = static_shared<Tiles<T>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = int64_t{blockIdx.y} * kM, column = int64_t{blockIdx.x} * kN;
  const auto load = [&](int stage, int k) {
    load_tile<kM, kK>(&tiles.a[stage][0][0], a + row * K + k, K);
    if constexpr (kTransposed) {
      load_tile<kN, kK>(tiles.b[stage], b + column * K + k, K);
    } else {
      load_tile<kK, kN>(tiles.b[stage], b + k * int64_t{N} + column, N);
    }
    cp_async_commit();
  };
  float acc[2][4] = {};
  load(0, 0);
  for (int k0 = 0; k0 < K; k0 += kK) {
    const int stage = k0 / kK % 2;
    if (k0 + kK < K) {
      load(1 - stage, k0 + kK);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    for (int k = 0; k < kK; k += 16) {
      uint32_t af[4], bf[4];
      ldmatrix<4>(af, &tiles.a[stage][16 * warp + lane % 16][k + lane / 16 * 8]);
      if constexpr (kTransposed) {  // rows n, columns k
        ldmatrix<4>(bf, tiles.b[stage] + (lane % 8 + lane / 16 * 8) * kK + k + lane / 8 % 2 * 8);
      } else {
        ldmatrix<4, true>(bf, tiles.b[stage] + (k + lane % 16) * kN + lane / 16 * 8);
      }
      for (int n = 0; n < 2; ++n) mma_m16n8k16<T>(acc[n], af, {bf[2 * n], bf[2 * n + 1]});
    }
    __syncthreads();
  }
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int64_t at_row = row + 16 * warp + lane / 4 + i / 2 * 8, at_column = column + 8 * n + lane % 4 * 2 + i % 2;
      c[at_row * N + at_column] = acc[n][i];
    }
  }
}

struct alignas(16) Matrices {
  uint16_t element[4][8][8];
};

// in [4, 8, 8] 16-bit elements; out [6, 4, 32]: x1, x1.trans, x2, x2.trans, x4, x4.trans.
__global__ void fragment_kernel(const uint16_t* in, uint32_t* out) {
  Matrices& shared = static_shared<Matrices>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += kWarp) shared.element[i / 64][i / 8 % 8][i % 8] = in[i];
  __syncwarp();
  const void* row = shared.element[lane / 8][lane % 8];
  int set = 0;
  const auto write = [&](const auto& fragment, int count) {
    for (int m = 0; m < count; ++m) out[(4 * set + m) * 32 + lane] = fragment[m];
    ++set;
  };
  uint32_t one[1], two[2], four[4];
  ldmatrix<1>(one, row);
  write(one, 1);
  ldmatrix<1, true>(one, row);
  write(one, 1);
  ldmatrix<2>(two, row);
  write(two, 2);
  ldmatrix<2, true>(two, row);
  write(two, 2);
  ldmatrix<4>(four, row);
  write(four, 4);
  ldmatrix<4, true>(four, row);
  write(four, 4);
}

// Copies n bytes in pieces of kBytes through cp.async, zeros after the end, up to the next multiple of kBytes.
template <int kBytes>
__global__ void tail_kernel(const unsigned char* in, unsigned char* out, int n) {
  unsigned char* shared = dynamic_shared();
  const int at = static_cast<int>(threadIdx.x) * kBytes;
  if (at < n) {
    cp_async<kBytes>(shared + at, in + at, n - at < kBytes ? n - at : kBytes);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < kBytes; ++i) out[at + i] = shared[at + i];
  }
}

template <class T>
cudaError_t launch_product(const void* a, const void* b, float* c, int M, int N, int K, bool transposed) {
  const auto kernel = transposed ? product_kernel<T, true> : product_kernel<T, false>;
  return launch(kernel, dim3(N / kN, M / kM), 32 * kWarps, 0, nullptr, static_cast<const T*>(a),
                static_cast<const T*>(b), c, N, K);
}

}  // namespace

extern "C" {

cudaError_t check_product(const void* a, const void* b, float* c, int M, int N, int K, bool transposed, bool bf16) {
  return bf16 ? launch_product<__nv_bfloat16>(a, b, c, M, N, K, transposed)
              : launch_product<__half>(a, b, c, M, N, K, transposed);
}

cudaError_t check_fragments(const uint16_t* in, uint32_t* out) {
  return launch(fragment_kernel, 1, 32, 0, nullptr, in, out);
}

cudaError_t check_tail(const unsigned char* in, unsigned char* out, int n, int bytes) {
  const auto kernel = bytes == 16 ? tail_kernel<16> : bytes == 8 ? tail_kernel<8> : tail_kernel<4>;
  return launch(kernel, 1, 64, 64 * 16, nullptr, in, out, n);
}

}  // extern "C"
}  // namespace diffullama
