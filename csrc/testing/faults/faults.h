// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each, beside the same kernels without it: what the simulator must notice, and what it must
// not.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "../../common/simt.cuh"

namespace diffullama {

constexpr int kCount = 256;

// Launched with kCount threads in all over in = 0, 1, ..., kCount - 1; both arrays hold exactly kCount.
using FaultKernel = void (*)(const int* in, int* out);

struct Fault {
  const char* name;
  FaultKernel good, faulty;
  int (*expected)(int i);  // out[i]
  int blocks = 1;
  int cluster = 1;
  bool cooperative = false;
};

std::vector<Fault> barrier_faults();
std::vector<Fault> warp_faults();
std::vector<Fault> access_faults();

}  // namespace diffullama
