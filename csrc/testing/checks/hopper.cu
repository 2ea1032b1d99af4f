// SPDX-License-Identifier: Apache-2.0
// A box through TMA as it lies in shared memory, a bulk copy, matrix products through TMA and wgmma, and a ring of
// buffers between a producer and consumers.
#include "../../common/hopper.cuh"

#include "../../common/launch.h"
#include "../../common/tensor_map.h"

namespace diffullama {
namespace {

struct Barriers {
  Mbarrier full[2], empty[2];
};

struct Maps {
  CUtensorMap a, b;
};

// Boxes of at most 256 rows of 64 elements; out [box_rows, 64] as the bytes lie.
__global__ void box_kernel(const __grid_constant__ CUtensorMap map, int x, int y, int z, int w, int box_rows,
                           uint16_t* out) {
  uint16_t* const box = swizzled_shared<uint16_t>();
  Mbarrier& full = static_shared<Barriers>().full[0];
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(full, box_rows * 128);
    tma_load(box, map, full, x, y, z, w);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < box_rows * kPanel; i += static_cast<int>(blockDim.x)) out[i] = box[i];
}

// out = in, 16-bit elements.
__global__ void bulk_kernel(const uint16_t* in, int bytes, uint16_t* out) {
  uint16_t* const copy = swizzled_shared<uint16_t>();
  Mbarrier& full = static_shared<Barriers>().full[0];
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(full, bytes);
    bulk_load(copy, in, bytes, full);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 2; i += static_cast<int>(blockDim.x)) out[i] = copy[i];
}

// Where wgmma takes a from: rows in shared memory, registers, or columns in shared memory, written there by threads.
enum class Left { kRows, kRegisters, kColumns };

constexpr int kDepth = 128, kDepthPanels = kDepth / kPanel;

template <int kColumns>
struct Operands {
  uint16_t a[kDepthPanels][64][kPanel];
  uint16_t b[kDepth * kColumns];  // panels of kColumns rows; or, transposed, of kDepth rows
};

// out [64, 8 kN] = a [64, kDepth] b; a group of four products each.
template <class T, int kN, bool kTransposed, Left kLeft>
__global__ void wgmma_kernel(const __grid_constant__ Maps maps, const uint16_t* a, float* out) {
  constexpr int kColumns = 8 * kN, kRows = kTransposed ? kDepth : kColumns;
  auto& shared = *swizzled_shared<Operands<kColumns>>();
  Mbarrier& full = static_shared<Barriers>().full[0];
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(full, static_cast<int>(sizeof shared));
    for (int i = 0; i < kDepthPanels; ++i) tma_load(shared.a[i], maps.a, full, i * kPanel, 0, 0, 0);
    for (int i = 0; i < kDepth * kColumns / kRows / kPanel; ++i) {
      tma_load(shared.b + i * kRows * kPanel, maps.b, full, i * kPanel, 0, 0, 0);
    }
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  if constexpr (kLeft == Left::kColumns) {  // over the rows that came through TMA
    uint16_t* const columns = &shared.a[0][0][0];
    for (int i = static_cast<int>(threadIdx.x); i < kDepth * 64; i += kWarpgroup) {
      const int depth = i / 64, chunk = i % 64 / 8 ^ depth % 8;
      columns[depth * kPanel + 8 * chunk + i % 8] = a[i % 64 * kDepth + depth];
    }
    fence_async_proxy();
    __syncthreads();
  }
  const int lane = threadIdx.x % kWarp, row = static_cast<int>(threadIdx.x) / kWarp * 16 + lane / 4;
  uint32_t left[kDepth / 16][4];
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t* const pair = a + (row + i % 2 * 8) * kDepth + 16 * k + lane % 4 * 2 + i / 2 * 8;
      left[k][i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
  float d[kN][4];
  wgmma_fence(d, left);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    const int panel = k / 4, in_row = k % 4 * 32;
    const uint64_t right = kTransposed ? matrix_after(matrix_descriptor(shared.b, kRows * 128), k * 16 * 128)
                                       : matrix_after(matrix_descriptor(shared.b), panel * kRows * 128 + in_row);
    if constexpr (kLeft == Left::kRegisters) {
      wgmma<T, kTransposed>(d, left[k], right, k > 0);
    } else if constexpr (kLeft == Left::kColumns) {
      wgmma<T, kTransposed, true>(d, matrix_after(matrix_descriptor(shared.a), k * 16 * 128), right, k > 0);
    } else {
      wgmma<T, kTransposed>(d, matrix_after(matrix_descriptor(shared.a), panel * 64 * 128 + in_row), right, k > 0);
    }
    if (k % 4 == 3) wgmma_commit();
  }
  wgmma_wait<1>();
  wgmma_wait<0>(d, left);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * kColumns + 8 * n + lane % 4 * 2 + i % 2] = d[n][i];
  }
}

// out [64 * 64] += the tiles [n, 64, 64] of the map, element by element as they lie; two buffers, a warpgroup that
// loads and one that adds.
__global__ void __launch_bounds__(2 * kWarpgroup, 1)
    ring_kernel(const __grid_constant__ CUtensorMap map, int n, uint32_t* out) {
  constexpr int kElements = 64 * kPanel;
  uint16_t* const buffers = swizzled_shared<uint16_t>();
  Barriers& barriers = static_shared<Barriers>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(barriers.full[i], 1);
      mbarrier_init(barriers.empty[i], kWarpgroup);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  if (thread < 0) {
    lower_registers<24>();
    for (int i = 0; i < n && threadIdx.x == 0; ++i) {
      mbarrier_wait(barriers.empty[i % 2], i / 2 % 2 ^ 1);
      mbarrier_arrive_expect(barriers.full[i % 2], 2 * kElements);
      tma_load(buffers + i % 2 * kElements, map, barriers.full[i % 2], 0, 0, i, 0);
    }
  } else {
    raise_registers<240>();
    for (int i = 0; i < n; ++i) {
      mbarrier_wait(barriers.full[i % 2], i / 2 % 2);
      for (int j = thread; j < kElements; j += kWarpgroup) out[j] += buffers[i % 2 * kElements + j];
      mbarrier_arrive(barriers.empty[i % 2]);
    }
  }
}

template <class T, int kN>
cudaError_t launch_wgmma(const Maps& maps, const uint16_t* a, float* out, bool transposed, Left left) {
  const auto of_left = [&](auto b) {
    constexpr bool kTransposed = decltype(b)::value;
    return left == Left::kRows        ? wgmma_kernel<T, kN, kTransposed, Left::kRows>
           : left == Left::kRegisters ? wgmma_kernel<T, kN, kTransposed, Left::kRegisters>
                                      : wgmma_kernel<T, kN, kTransposed, Left::kColumns>;
  };
  const auto kernel = transposed ? of_left(std::true_type{}) : of_left(std::false_type{});
  return launch(kernel, 1, kWarpgroup, sizeof(Operands<8 * kN>) + kSwizzleBytes, nullptr, maps, a, out);
}

}  // namespace

extern "C" {

// in of size[4] elements, innermost first, contiguous.
cudaError_t check_box(const uint16_t* in, const int* size, const int* at, int box_rows, uint16_t* out) {
  TensorMapShape shape{};
  uint64_t stride = 2;
  for (int d = 0; d < 4; ++d) {
    shape.size[d] = static_cast<uint64_t>(size[d]);
    if (d > 0) shape.stride[d - 1] = stride;
    stride *= shape.size[d];
  }
  shape.box_rows = static_cast<uint32_t>(box_rows);
  CUtensorMap map;
  const cudaError_t error = encode_tensor_map(map, in, true, shape);
  if (error != cudaSuccess) return error;
  return launch(box_kernel, 1, 64, box_rows * 128 + kSwizzleBytes, nullptr, map, at[0], at[1], at[2], at[3], box_rows,
                out);
}

cudaError_t check_bulk(const uint16_t* in, int bytes, uint16_t* out) {
  return launch(bulk_kernel, 1, 64, bytes + kSwizzleBytes, nullptr, in, bytes, out);
}

// a [64, 128]; b [128, columns], stored as its transpose unless `transposed`.
cudaError_t check_wgmma(const uint16_t* a, const uint16_t* b, float* out, int columns, bool transposed, int place,
                        bool bf16) {
  const auto left = static_cast<Left>(place);
  const auto matrix = [](int rows, int length) {
    return TensorMapShape{{static_cast<uint64_t>(length), static_cast<uint64_t>(rows), 1, 1},
                          {2 * static_cast<uint64_t>(length)},
                          static_cast<uint32_t>(rows)};
  };
  Maps maps;
  cudaError_t error = encode_tensor_map(maps.a, a, !bf16, matrix(64, kDepth));
  if (error == cudaSuccess) {
    error = encode_tensor_map(maps.b, b, !bf16, transposed ? matrix(kDepth, columns) : matrix(columns, kDepth));
  }
  if (error != cudaSuccess) return error;
  if (columns == 64) {
    return bf16 ? launch_wgmma<__nv_bfloat16, 8>(maps, a, out, transposed, left)
                : launch_wgmma<__half, 8>(maps, a, out, transposed, left);
  }
  return bf16 ? launch_wgmma<__nv_bfloat16, 16>(maps, a, out, transposed, left)
              : launch_wgmma<__half, 16>(maps, a, out, transposed, left);
}

// in [n, 64, 64].
cudaError_t check_ring(const uint16_t* in, uint32_t* out, int n) {
  CUtensorMap map;
  const TensorMapShape shape{{64, 64, static_cast<uint64_t>(n), 1}, {128, 64 * 128}, 64};
  const cudaError_t error = encode_tensor_map(map, in, true, shape);
  if (error != cudaSuccess) return error;
  return launch(ring_kernel, 1, 2 * kWarpgroup, 2 * 64 * 128 + kSwizzleBytes, nullptr, map, n, out);
}

}  // extern "C"
}  // namespace diffullama
