// SPDX-License-Identifier: Apache-2.0
// How a kernel is launched for a shape, and what it cannot avoid: one function makes it, the launcher and `kernel_plan`
// in Python both read it. Host code without torch or CUDA.
#pragma once

#include <cstdint>
#include <string>

namespace diffullama {

struct KernelPlan {
  std::string kernel;  // name as profilers show it
  int64_t grid = 0;    // blocks
  int block = 0;       // threads of a block
  int cluster = 1;     // blocks of a cluster
  int64_t shared_bytes = 0;
  int64_t bytes = 0;  // global memory that must be read or written once
  int64_t flops = 0;  // arithmetic of matrix products; 0 where memory alone bounds the kernel
};

// What a plan may use of the device; by default an H100's or H200's.
struct DeviceLimits {
  int n_sm = 132;
  int64_t shared_bytes = 227 << 10;  // of a block
  bool clusters = true;              // of up to 8 blocks
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace diffullama
