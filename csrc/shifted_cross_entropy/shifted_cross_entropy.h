// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "../common/tensor.h"

namespace diffullama {

struct LossOptions {
  bool shift;              // logits row i scores token i + 1
  double label_smoothing;  // in [0, 1]
  double softcap;          // 0 is none
};

// lead [B, L, ...] float; x0 [B, L] int64; masked [B, L] bool.
inline void check_targets(const char* name, const Tensor& lead, const Tensor& x0, const Tensor& masked,
                          const LossOptions& options) {
  check(is_floating(lead.scalar_type()), name, " must be a float tensor");
  check_tensor(name, lead, lead.scalar_type(), {kAny, kAny, kAny});
  const int64_t B = lead.size(0), L = lead.size(1);
  check_tensor("x0", x0, ScalarType::Long, {B, L}, &lead);
  check_tensor("masked", masked, ScalarType::Bool, {B, L}, &lead);
  check(options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing must be in [0, 1], got ",
        options.label_smoothing);
  check(options.softcap >= 0, "softcap must be at least 0, got ", options.softcap);
}

// hidden [B, L, H], weight [V, H], bias [V], of one dtype.
inline void check_linear(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& x0, const Tensor& masked, const LossOptions& options, int64_t chunk_rows,
                         ScalarType accum_dtype) {
  check_targets("hidden", hidden, x0, masked, options);
  check_tensor("weight", weight, hidden.scalar_type(), {kAny, hidden.size(2)}, &hidden);
  if (bias) check_tensor("bias", *bias, hidden.scalar_type(), {weight.size(0)}, &hidden);
  check(chunk_rows >= 0, "chunk_rows must be at least 0, got ", chunk_rows);
  check(accum_dtype == ScalarType::Double ||
            (accum_dtype == ScalarType::Float && hidden.scalar_type() != ScalarType::Double),
        "accum_dtype must be float32, or float64 (always for float64 inputs)");
}

}  // namespace diffullama
