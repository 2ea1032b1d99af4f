// SPDX-License-Identifier: Apache-2.0
// faults: the names. faults NAME: launches that faulty kernel a few times; says the first error or wrong result and
// exits with 1. faults good: the same for all kernels without their faults.
#include <cstdio>
#include <cstring>

#include "../../common/launch.h"
#include "faults.h"

namespace diffullama {
namespace {

constexpr int kLaunches = 4;

bool runs_right(const Fault& fault, bool faulty, int launch_number) {
  int *in = nullptr, *out = nullptr;
  cudaError_t error = cudaMallocManaged(&in, kCount * sizeof(int));
  if (error == cudaSuccess) error = cudaMallocManaged(&out, kCount * sizeof(int));
  if (error == cudaSuccess) {
    for (int i = 0; i < kCount; ++i) in[i] = i, out[i] = -1;
    const LaunchOptions options{static_cast<unsigned>(fault.cluster), fault.cooperative};
    error = launch_with(options, faulty ? fault.faulty : fault.good, fault.blocks, kCount / fault.blocks, 0, nullptr,
                        in, out);
  }
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  bool right = error == cudaSuccess;
  if (!right) std::printf("%s: error: %s\n", fault.name, cudaGetErrorString(error));
  for (int i = 0; right && i < kCount; ++i) {
    right = out[i] == fault.expected(i);
    if (!right) {
      std::printf("%s: wrong: out[%d] = %d, not %d, in launch %d\n", fault.name, i, out[i], fault.expected(i),
                  launch_number);
    }
  }
  cudaFree(in);
  cudaFree(out);
  return right;
}

}  // namespace
}  // namespace diffullama

int main(int argc, char** argv) {
  using namespace diffullama;
  const char* name = argc > 1 ? argv[1] : nullptr;
  bool right = true;
  for (const auto& list : {barrier_faults(), warp_faults(), access_faults()}) {
    for (const Fault& fault : list) {
      if (name == nullptr) {
        std::puts(fault.name);
      } else if (std::strcmp(name, "good") == 0 || std::strcmp(name, fault.name) == 0) {
        for (int k = 0; k < kLaunches && right; ++k) right = runs_right(fault, std::strcmp(name, "good") != 0, k);
      }
    }
  }
  return right ? 0 : 1;
}
