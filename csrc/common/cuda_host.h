// SPDX-License-Identifier: Apache-2.0
// The host side of a CUDA op: guard, stream, errors as exceptions, and the key it is registered under. In the simulator
// the same ops run on CPU tensors.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "tensor.h"

#if defined(DIFFULLAMA_SIMULATED)
#define DIFFULLAMA_CUDA_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
// Exported by libtorch_cuda; torch's header declares it only to CUDA builds of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#define DIFFULLAMA_CUDA_KEY CUDA
#endif

namespace diffullama {

#if defined(DIFFULLAMA_SIMULATED)
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

inline void check_launch(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
  }
}

}  // namespace diffullama
