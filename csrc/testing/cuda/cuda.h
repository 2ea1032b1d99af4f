// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA driver API that host code here uses: tensor maps, with the limits that the driver documents.
#pragma once

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// Of 16-bit elements; what the box copies from, innermost dimension first, in elements and bytes.
struct CUtensorMap {
  const char* data;
  uint32_t rank;
  uint64_t size[5], stride[5];  // stride[0] is 2
  uint32_t box[5];
  bool swizzled;
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                       const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(data) % 16) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(data), rank, {}, {2}, {}, swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  for (cuuint32_t d = 0; d < rank; ++d) {
    map->size[d] = size[d];
    map->box[d] = box[d];
    if (d > 0) map->stride[d] = stride[d - 1];
    const bool valid = size[d] > 0 && size[d] <= uint64_t{1} << 32 && box[d] > 0 && box[d] <= 256 && step[d] == 1 &&
                       (d == 0 || (stride[d - 1] % 16 == 0 && stride[d - 1] > 0 && stride[d - 1] < uint64_t{1} << 40));
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
  }
  const uint32_t inner = 2 * box[0];
  return inner % 16 || (map->swizzled && inner > 128) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
