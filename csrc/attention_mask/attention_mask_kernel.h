// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace diffullama {

// Contiguous tensors, none of them empty; M masks, W = ceil(Lk / 32) words a row.
struct PackMaskParams {
  const uint8_t* allowed;  // [M, Lq, Lk] bool
  uint32_t* words;         // [M, Lq, W]
  int64_t M, Lq, Lk;
};

struct UnpackMaskParams {
  const uint32_t* words;  // [M, Lq, W]
  uint8_t* allowed;       // [M, Lq, Lk] bool
  int64_t M, Lq, Lk;
};

struct IdMaskParams {
  const int64_t* query_ids;  // [M, Lq]
  const int64_t* key_ids;    // [M, Lk]
  uint32_t* words;           // [M, Lq, W]
  int64_t M, Lq, Lk;
  bool exact;
};

struct AnnealedMaskParams {
  const float* attn_mask_ratio;  // [1]
  const int64_t* seed;           // [1]
  const int64_t* step;           // [1]
  uint32_t* words;               // [1, length, W]
  int64_t length;
};

struct FragmentMaskParams {
  const uint32_t* words;  // [M, Lq, W]
  uint32_t* fragments;    // [M, ceil(rows / 64), ceil(columns / 128), 128, 2]
  int64_t M, Lq, Lk;
  bool transposed;
};

struct TileClassesParams {
  const uint32_t* words;  // [M, Lq, W]
  uint8_t* classes;       // [M, ceil(Lq / tile_rows), ceil(Lk / tile_cols)]
  int64_t M, Lq, Lk, tile_rows, tile_cols;
};

cudaError_t launch_pack_mask(const PackMaskParams& p, cudaStream_t stream);
cudaError_t launch_unpack_mask(const UnpackMaskParams& p, cudaStream_t stream);
cudaError_t launch_id_mask(const IdMaskParams& p, cudaStream_t stream);
cudaError_t launch_annealed_mask(const AnnealedMaskParams& p, cudaStream_t stream);
cudaError_t launch_fragment_mask(const FragmentMaskParams& p, cudaStream_t stream);
cudaError_t launch_mask_tile_classes(const TileClassesParams& p, cudaStream_t stream);

}  // namespace diffullama
