// SPDX-License-Identifier: Apache-2.0
// The loss of one row of logits and its derivative; host and device.
//   nll(z) = (1 - s) (lse - z[y]) + s (lse - mean z) = lse - (1 - s) z[y] - s mean z,  s the label smoothing
//   d nll / d z[v] = softmax(z)[v] - (1 - s) [v = y] - s / V
#pragma once

#include <cstdint>

#include "../common/macros.h"

namespace diffullama {

template <class Acc>
DIFFULLAMA_HOST_DEVICE Acc row_nll(Acc lse, Acc target_logit, Acc mean_logit, Acc smoothing) {
  return smoothing == Acc(0) ? lse - target_logit : lse - (Acc(1) - smoothing) * target_logit - smoothing * mean_logit;
}

// Row of logits that scores token j, by the shift.
DIFFULLAMA_HOST_DEVICE int64_t scoring_row(int64_t j, bool shift) { return shift ? j - 1 : j; }

// Derivative of softcap * tanh(z / softcap) in terms of its value.
template <class Acc>
DIFFULLAMA_HOST_DEVICE Acc softcap_slope(Acc capped, Acc softcap) {
  const Acc y = capped / softcap;
  return Acc(1) - y * y;
}

}  // namespace diffullama
