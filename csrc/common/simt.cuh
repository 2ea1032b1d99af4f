// SPDX-License-Identifier: Apache-2.0
// What kernels use beyond plain CUDA: each function once, with a body for the device and one for the simulator
// (csrc/testing), where DIFFULLAMA_SIMULATED is defined and <cuda_runtime.h> is the simulator's. docs/simulator.md is
// the guide.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace diffullama {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Where a barrier is called, for the simulator's messages; nothing on the device.
#if defined(DIFFULLAMA_SIMULATED)
using simulator::Site;
#else
struct Site {
  static __device__ __forceinline__ Site here() { return {}; }
};
#endif

// --- shared memory; uninitialised at the start of a block

// The block's one variable of type T. Every call with this T is the same variable: give each purpose its own struct.
template <class T>
__device__ __forceinline__ T& static_shared() {
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory runs no constructors");
  static_assert(sizeof(T) <= (48 << 10), "more than 48 KB of shared memory must be dynamic");
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

// --- named barriers, id 1 to 15 (0 is __syncthreads); n_threads counts whole warps, and all their threads call

// Waits until n_threads threads of the block have arrived.
__device__ __forceinline__ void barrier_sync(int id, int n_threads, [[maybe_unused]] Site site = Site::here()) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::named_barrier(id, n_threads, true, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
#endif
}

// Arrives without waiting, for those that do.
__device__ __forceinline__ void barrier_arrive(int id, int n_threads, [[maybe_unused]] Site site = Site::here()) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::named_barrier(id, n_threads, false, site);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
#endif
}

// --- clusters of blocks along x (launch_cluster); below sm_90 every block is a cluster of its own

__device__ __forceinline__ int cluster_rank() {
#if defined(DIFFULLAMA_SIMULATED)
  return simulator::cluster_rank();
#elif __CUDA_ARCH__ >= 900
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if defined(DIFFULLAMA_SIMULATED)
  return simulator::cluster_size();
#elif __CUDA_ARCH__ >= 900
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// A barrier of the cluster's threads that also orders their accesses to each other's shared memory. Needed before the
// first such access, and before a block whose memory others may still read ends.
__device__ __forceinline__ void cluster_sync([[maybe_unused]] Site site = Site::here()) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::cluster_barrier(site);
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The place in block `rank` of the cluster that `mine` is in this block's shared memory.
template <class T>
__device__ __forceinline__ T* shared_of_rank(T* mine, [[maybe_unused]] int rank) {
#if defined(DIFFULLAMA_SIMULATED)
  return static_cast<T*>(simulator::shared_of_rank(mine, rank));
#elif __CUDA_ARCH__ >= 900
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return mine;
#endif
}

// --- ordered global memory, for flags that another block polls (in a loop that calls nothing else to wait)

template <class T>
__device__ __forceinline__ T load_acquire(const T* address) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "flags are 32 or 64 bits");
#if defined(DIFFULLAMA_SIMULATED)
  simulator::scheduling_point();
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#else
  if constexpr (sizeof(T) == 4) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return static_cast<T>(value);
  } else {
    uint64_t value;
    asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return static_cast<T>(value);
  }
#endif
}

template <class T>
__device__ __forceinline__ void store_release(T* address, T value) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "flags are 32 or 64 bits");
#if defined(DIFFULLAMA_SIMULATED)
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
  simulator::scheduling_point();
#else
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(address), "r"(static_cast<uint32_t>(value)) : "memory");
  } else {
    asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(address), "l"(static_cast<uint64_t>(value)) : "memory");
  }
#endif
}

// --- sums in global memory

// *to += value as one step of memory, and nothing is returned. Additions of several threads to one float round in
// whatever order they arrive.
__device__ __forceinline__ void reduce_add(float* to, float value) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::reduce_add(to, value);
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(value) : "memory");
#endif
}

// The same of four floats, each by itself; `to` is aligned to 16 bytes. One instruction from sm_90 on.
__device__ __forceinline__ void reduce_add(float* to, float4 value) {
#if !defined(DIFFULLAMA_SIMULATED) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
#else
  reduce_add(to, value.x);
  reduce_add(to + 1, value.y);
  reduce_add(to + 2, value.z);
  reduce_add(to + 3, value.w);
#endif
}

// --- arithmetic

// 2^v by the hardware's approximation (relative error 2^-22); denormal results are 0.
__device__ __forceinline__ float exp2_approx(float v) {
#if defined(DIFFULLAMA_SIMULATED)
  return v < -126.0f ? 0.0f : std::exp2(v);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#endif
}

}  // namespace diffullama
