// SPDX-License-Identifier: Apache-2.0
// mbarrier, TMA loads and wgmma on the host, for csrc/common/hopper.cuh. Copies and products happen at once or late, as
// the generator decides: a copy at the latest when nobody can run without it or threads spin, a warp's part of a
// product when all its lanes wait for it.
#pragma once

#include <cstdint>

#include "cuda/cuda.h"
#include "simulator.h"

namespace simulator {

// An address in the shared memory of the block, of which the dynamic part is simulated: it begins at a multiple of 128
// that differs between launches.
uint32_t shared_address(const void* variable);

void mbarrier_init(void* barrier, int arrivals);
void mbarrier_arrive(void* barrier, int expected_bytes);
void mbarrier_wait(void* barrier, int parity, Site site);

struct BoxPlace {
  int first[5];
};
void tma_load(void* shared, const CUtensorMap& map, void* barrier, const BoxPlace& at);
void bulk_load(void* shared, const void* global, int bytes, void* barrier);

// d [64, columns] (+)= a [64, 16] b [16, columns].
struct Wgmma {
  uint64_t a, b;  // descriptors; a is not used where it comes from registers
  bool a_in_registers, a_transposed, b_transposed, accumulate, is_half;
  int columns;

  bool operator==(const Wgmma& o) const {
    return a == o.a && b == o.b && a_in_registers == o.a_in_registers && a_transposed == o.a_transposed &&
           b_transposed == o.b_transposed && accumulate == o.accumulate && is_half == o.is_half && columns == o.columns;
  }
};
void wgmma_fence();
void wgmma(const Wgmma& product, float* d, const uint32_t* a, Site site);  // columns / 2 of d, 4 of a a thread
void wgmma_commit();
void wgmma_wait(int groups_left, Site site);

}  // namespace simulator
