// SPDX-License-Identifier: Apache-2.0
// What kernels use beyond plain CUDA, once for the device and once for the simulator (csrc/testing), where
// DIFFULLAMA_SIMULATED is defined and <cuda_runtime.h> is the simulator's: shared memory, named barriers, the grid's
// barrier, clusters, ordered loads and stores. docs/simulator.md is the guide.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace diffullama {

constexpr int kWarp = 32;

// --- shared memory

// The block's one variable of type T: every call of the same kernel with this T is the same variable, so give each
// purpose its own struct. Uninitialised at the start of a block.
template <class T>
__device__ __forceinline__ T& static_shared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory runs no constructors");
#if defined(DIFFULLAMA_SIMULATED)
  static const char key = 0;
  return *static_cast<T*>(simulator::static_shared(&key, sizeof(T), alignof(T)));
#else
  __shared__ T variable;
  return variable;
#endif
}

// The shared memory whose size the launch gave, aligned to 128 bytes.
template <class T = unsigned char>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(DIFFULLAMA_SIMULATED)
  return static_cast<T*>(simulator::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
#endif
}

#if defined(DIFFULLAMA_SIMULATED)
#define DIFFULLAMA_SITE_ARGUMENT , simulator::Site site = simulator::Site::here()
#else
#define DIFFULLAMA_SITE_ARGUMENT
#endif

// --- barriers beyond __syncthreads; n_threads counts whole warps, all of whose threads call

// Waits until n_threads threads of the block have arrived at barrier id, 1 to 15 (0 is __syncthreads).
__device__ __forceinline__ void barrier_sync(int id, int n_threads) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::named_barrier(id, n_threads, true, simulator::Site::here());
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
#endif
}

// Arrives without waiting; those that call barrier_sync with the same id and count wait for it.
__device__ __forceinline__ void barrier_arrive(int id, int n_threads) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::named_barrier(id, n_threads, false, simulator::Site::here());
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
#endif
}

}  // namespace diffullama
