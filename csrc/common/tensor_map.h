// SPDX-License-Identifier: Apache-2.0
// Tensor maps for TMA, encoded by the driver; host code. The driver's function is asked for when it is first needed, so
// that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace diffullama {

// A 16-bit tensor of four dimensions, innermost first, of which the innermost is dense, and the box that a load copies,
// 64 elements wide: into rows of 128 bytes, swizzled. Strides in bytes, multiples of 16; that of a dimension of one
// entry is not used. Zeros outside.
struct TensorMapShape {
  uint64_t size[4];
  uint64_t stride[3];  // of dimensions 1 to 3
  uint32_t box_rows;   // of dimension 1; one entry of 2 and 3
};

inline cudaError_t encode_tensor_map(CUtensorMap& map, const void* data, bool is_half, const TensorMapShape& shape) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t size[4], stride[3];
  for (int d = 0; d < 4; ++d) size[d] = shape.size[d];
  for (int d = 0; d < 3; ++d) {
    const cuuint64_t dense = d == 0 ? 2 * size[0] : stride[d - 1] * size[d];
    stride[d] = size[d + 1] == 1 ? dense : shape.stride[d];
  }
  const cuuint32_t box[4] = {64, shape.box_rows, 1, 1}, step[4] = {1, 1, 1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  const CUresult result =
      encode(&map, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace diffullama
