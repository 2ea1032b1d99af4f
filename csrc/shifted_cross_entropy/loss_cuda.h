// SPDX-License-Identifier: Apache-2.0
// What the two CUDA host files share: tensors to kernel parameters.
#pragma once

#include "../common/cuda_host.h"
#include "loss_kernel.h"
#include "shifted_cross_entropy.h"

namespace diffullama {

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat;
  }
}

// x0 and masked are contiguous and outlive the launch.
inline LossTargets targets_of(const Tensor& x0, const Tensor& masked, int64_t V, const LossOptions& options) {
  LossTargets t{};
  t.x0 = x0.const_data_ptr<int64_t>();
  t.masked = masked.const_data_ptr<bool>();
  t.B = x0.size(0);
  t.L = x0.size(1);
  t.V = V;
  t.shift = options.shift;
  t.label_smoothing = options.label_smoothing;
  t.softcap = options.softcap;
  return t;
}

}  // namespace diffullama
