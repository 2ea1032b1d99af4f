// SPDX-License-Identifier: Apache-2.0
// The CUDA language for kernels compiled as C++: keywords, built-in variables and functions. Only what a kernel here
// may use is declared, so the rest fails to compile: __shared__ (static_shared and dynamic_shared of simt.cuh take its
// place), __activemask, and atomics on floating-point numbers, whose order would change results.
#pragma once

#include "atomics.h"
#include "cuda_runtime_api.h"
#include "intrinsics.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ const
#define __grid_constant__
#define __shared__ shared_variables_come_from_static_shared_and_dynamic_shared

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads(simulator::Site site = simulator::Site::here()) {
  simulator::block_barrier("__syncthreads", 0, site);
}
inline int __syncthreads_count(int predicate, simulator::Site site = simulator::Site::here()) {
  return simulator::block_barrier("__syncthreads_count", predicate != 0, site);
}
inline int __syncthreads_or(int predicate, simulator::Site site = simulator::Site::here()) {
  return simulator::block_barrier("__syncthreads_or", predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, simulator::Site site = simulator::Site::here()) {
  return simulator::block_barrier("__syncthreads_and", predicate == 0, site) == 0;
}

// Memory is that of one operating-system thread, so order needs no fence; a fence is where another thread may run.
inline void __threadfence_block() { simulator::scheduling_point(); }
inline void __threadfence() { simulator::scheduling_point(); }
inline void __threadfence_system() { simulator::scheduling_point(); }
inline void __nanosleep(unsigned) { simulator::scheduling_point(); }
[[noreturn]] inline void __trap() { simulator::fail("__trap"); }
