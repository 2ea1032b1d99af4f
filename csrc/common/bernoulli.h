// SPDX-License-Identifier: Apache-2.0
// Bernoulli decisions as integer comparisons, exact to 2^-32 and equal on every device.
#pragma once

#include <cstdint>

#include "macros.h"

namespace diffullama {

constexpr uint64_t kCertain = uint64_t{1} << 32;

// word < threshold32(p) holds with probability p. p = 1 gives 2^32, above every word; NaN and p < 0 give 0.
DIFFULLAMA_HOST_DEVICE uint64_t threshold32(float p) {
  if (!(p > 0.0f)) return 0;
  return p >= 1.0f ? kCertain : static_cast<uint64_t>(static_cast<double>(p) * 4294967296.0);
}

// 32 Bernoulli(0.p31 p30 ... p0) draws from random planes, lowest plane first: r starts at 0 and every plane k does
// this. Planes below the lowest set bit of the threshold leave r at 0 and can be skipped.
DIFFULLAMA_HOST_DEVICE uint32_t bernoulli_plane(uint32_t r, uint32_t plane, uint64_t threshold, int k) {
  return (threshold >> k) & 1 ? r | plane : r & plane;
}

}  // namespace diffullama
