// SPDX-License-Identifier: Apache-2.0
// Philox for kPhiloxLanes counters at once, as loops that compilers vectorise. Call it from DIFFULLAMA_VECTORIZED code.
#pragma once

#include "philox.h"

namespace diffullama {

constexpr int kPhiloxLanes = 16;

// c[k][lane] holds counter word k on entry and random word k on return.
static inline __attribute__((always_inline)) void philox_lanes(uint32_t (&c)[4][kPhiloxLanes], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      philox_round(c[0][lane], c[1][lane], c[2][lane], c[3][lane], k0, k1);
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

}  // namespace diffullama
