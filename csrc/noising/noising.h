// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../common/tensor.h"

namespace diffullama {

// x0 [B, L] int64, p_mask [B] or [B, L] float32, maskable [B, L] bool, seed [1] int64, sample_index [B] int64.
inline void check_mask_tokens(const Tensor& x0, const Tensor& p_mask, const std::optional<Tensor>& maskable,
                              const Tensor& seed, const Tensor& sample_index, int64_t mask_id) {
  check_tensor("x0", x0, ScalarType::Long, {kAny, kAny});
  const int64_t B = x0.size(0), L = x0.size(1);
  if (p_mask.dim() == 2) {
    check_tensor("p_mask", p_mask, ScalarType::Float, {B, L}, &x0);
  } else {
    check_tensor("p_mask", p_mask, ScalarType::Float, {B}, &x0);
  }
  if (maskable) check_tensor("maskable", *maskable, ScalarType::Bool, {B, L}, &x0);
  check_tensor("seed", seed, ScalarType::Long, {1}, &x0);
  check_tensor("sample_index", sample_index, ScalarType::Long, {B}, &x0);
  check(mask_id >= 0, "mask_id must be at least 0, got ", mask_id);
}

}  // namespace diffullama
