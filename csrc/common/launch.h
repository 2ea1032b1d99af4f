// SPDX-License-Identifier: Apache-2.0
// Kernel launches. Arguments are converted to the kernel's parameters; more than 48 KB of dynamic shared memory is
// opted into. All return the error of the launch, for check_launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kernel_plan.h"

namespace diffullama {

struct LaunchOptions {
  unsigned cluster = 1;      // blocks of a cluster along x; above 1 needs sm_90
  bool cooperative = false;  // all blocks resident together, for a grid barrier
};

template <class... Params, class... Args>
cudaError_t launch_with(LaunchOptions options, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, Args&&... args) {
  if (shared_bytes > (48 << 10)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  if (options.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  unsigned n = 0;
  if (options.cooperative) {
    attributes[n].id = cudaLaunchAttributeCooperative;
    attributes[n++].val.cooperative = 1;
  }
  if (options.cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n++].val.clusterDim = {options.cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = n;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  return launch_with({}, kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

// For kernels with a grid barrier: fails where the blocks cannot be resident together (resident_blocks says how many).
template <class... Params, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, Args&&... args) {
  return launch_with({1, true}, kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
cudaError_t launch_cluster(unsigned cluster, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                           cudaStream_t stream, Args&&... args) {
  return launch_with({cluster, false}, kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

// Blocks of this kernel that the current device holds at once.
template <class... Params>
cudaError_t resident_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes, int64_t& blocks) {
  int device = 0, n_sm = 0, per_sm = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes);
  }
  blocks = int64_t{n_sm} * per_sm;
  return error;
}

// What launches of this kernel may use on the current device. Clusters need an architecture that has them both here and
// in the kernel's code, which may be PTX of an older one.
template <class... Params>
cudaError_t device_limits(void (*kernel)(Params...), DeviceLimits& limits) {
  int device = 0, shared_bytes = 0, major = 0;
  cudaFuncAttributes code{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limits.n_sm, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, kernel);
  limits.shared_bytes = shared_bytes;
  limits.clusters = major >= 9 && code.ptxVersion >= 90;
  return error;
}

}  // namespace diffullama
