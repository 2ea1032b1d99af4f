// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that host code here uses, over the simulator: one device, everything synchronous.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "../simulator.h"
#include "cuda.h"
#include "vector_types.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure:
      return simulator::last_error().c_str();
    default:
      return "invalid argument";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// The simulated architecture: DIFFULLAMA_SIMULATED_ARCH=80 has no clusters and less shared memory a block.
inline int simulated_arch() {
  const char* value = std::getenv("DIFFULLAMA_SIMULATED_ARCH");
  return value ? std::atoi(value) : 90;
}
inline size_t shared_bytes_per_block() {
  return simulated_arch() >= 90 ? simulator::kSharedBytesPerBlock : size_t{163} << 10;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = simulator::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = simulated_arch() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = simulated_arch() % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(shared_bytes_per_block());
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// --- the driver's functions
enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaMallocManaged(T** address, size_t size) {
  *address = static_cast<T*>(std::malloc(size));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t = nullptr) {
  std::memset(to, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t = nullptr) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}

// --- launching
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  int ptxVersion;
};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = simulated_arch();
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t shared_bytes) {
  const int by_shared = static_cast<int>(shared_bytes ? simulator::kSharedBytesPerBlock / shared_bytes : 32);
  const int by_threads = simulator::kThreadsPerMultiprocessor / threads;
  *blocks = by_shared < by_threads ? by_shared : by_threads;
  return cudaSuccess;
}

// What cudaLaunchKernelEx refuses, or cudaSuccess and the shape to run.
inline cudaError_t launch_shape(const cudaLaunchConfig_t& config, simulator::Shape& shape) {
  const dim3 g = config.gridDim, b = config.blockDim;
  shape = {{g.x, g.y, g.z}, {b.x, b.y, b.z}, 1, config.dynamicSmemBytes, false};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) shape.cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) shape.cluster = attribute.val.clusterDim.x;
  }
  const size_t blocks = size_t{g.x} * g.y * g.z, threads = size_t{b.x} * b.y * b.z;
  const bool valid = blocks > 0 && g.y < 65536 && g.z < 65536 && threads > 0 && threads <= 1024 && b.z <= 64 &&
                     shape.cluster > 0 && shape.cluster <= 16 && g.x % shape.cluster == 0 &&
                     !(shape.cooperative && shape.cluster > 1) &&  // not simulated
                     shape.shared_bytes <= simulator::kSharedBytesPerBlock;
  if (!valid) return cudaErrorInvalidConfiguration;
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, &launch_shape, static_cast<int>(threads),
                                                shape.shared_bytes);
  const bool fits = blocks <= size_t{simulator::kMultiprocessors} * static_cast<size_t>(resident);
  return shape.cooperative && !fits ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  simulator::Shape shape;
  const cudaError_t error = launch_shape(*config, shape);
  if (error != cudaSuccess) return error;
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  return simulator::run(shape, [&] { std::apply(kernel, params); }) ? cudaSuccess : cudaErrorLaunchFailure;
}
