// SPDX-License-Identifier: Apache-2.0
// The decision of the absorbing forward process; host and device.
#pragma once

#include "../common/bernoulli.h"
#include "../common/philox.h"

namespace diffullama {

DIFFULLAMA_HOST_DEVICE bool is_masked(uint32_t word, uint64_t threshold, bool maskable) {
  return maskable && word < threshold;
}

}  // namespace diffullama
