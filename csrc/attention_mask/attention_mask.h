// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../common/tensor.h"

namespace diffullama {

inline void check_pack_mask(const Tensor& allowed) {
  check_tensor("allowed", allowed, ScalarType::Bool, {kAny, kAny, kAny});
}

inline void check_unpack_mask(const Tensor& words, int64_t k_length) {
  check_tensor("words", words, ScalarType::Int, {kAny, kAny, (k_length + 31) / 32});
  check(k_length >= 0, "k_length must be at least 0, got ", k_length);
}

inline void check_id_mask(const Tensor& query_ids, const Tensor& key_ids) {
  check_tensor("query_ids", query_ids, ScalarType::Long, {kAny, kAny});
  check_tensor("key_ids", key_ids, ScalarType::Long, {query_ids.size(0), kAny}, &query_ids);
}

// The word index of a row and 8 plane groups share 32 counter bits.
constexpr int64_t kMaxMaskLength = int64_t{1} << 31;

inline void check_annealed_mask(int64_t length, const Tensor& attn_mask_ratio, const Tensor& seed, const Tensor& step) {
  check(length >= 0 && length < kMaxMaskLength, "length must be in [0, 2^31), got ", length);
  check_tensor("attn_mask_ratio", attn_mask_ratio, ScalarType::Float, {1});
  check_tensor("seed", seed, ScalarType::Long, {1}, &attn_mask_ratio);
  check_tensor("step", step, ScalarType::Long, {1}, &attn_mask_ratio);
}

inline void check_mask_tile_classes(const Tensor& words, int64_t k_length, int64_t tile_rows, int64_t tile_cols) {
  check_unpack_mask(words, k_length);
  check(tile_rows > 0 && tile_cols > 0 && tile_rows < kMaxMaskLength && tile_cols < kMaxMaskLength,
        "tile_rows and tile_cols must be in [1, 2^31), got ", tile_rows, " and ", tile_cols);
}

}  // namespace diffullama
