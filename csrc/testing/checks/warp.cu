// SPDX-License-Identifier: Apache-2.0
// Every warp-wide operation once, results to memory; python_tests/simulator says what they should be.
#include <cuda_runtime.h>

#include <cstdint>

#include "../../common/launch.h"
#include "../../common/simt.cuh"

namespace diffullama {
namespace {

// Rows of 32 results, one a lane.
__global__ void shuffle_kernel(const int64_t* in, int64_t* out) {
  const int lane = threadIdx.x;
  const int64_t v = in[lane];
  int row = 0;
  const auto write = [&](int64_t result) { out[32 * row++ + lane] = result; };
  write(__shfl_sync(kAllLanes, v, 5));
  write(__shfl_sync(kAllLanes, v, lane * 7));  // taken modulo 32
  write(__shfl_sync(kAllLanes, v, 3, 8));
  write(__shfl_up_sync(kAllLanes, v, 3));
  write(__shfl_down_sync(kAllLanes, v, 5, 16));
  write(__shfl_xor_sync(kAllLanes, v, 9));
  write(static_cast<int64_t>(__shfl_xor_sync(kAllLanes, static_cast<float>(v), 1)));
  if (lane % 2 == 0) {  // half the warp, on its own
    write(__shfl_sync(0x55555555u, v, (lane + 2) % 32));
  } else {
    write(-1);
  }
}

__global__ void vote_kernel(const int* in, int64_t* out) {
  const int lane = threadIdx.x, v = in[lane];
  const auto u = static_cast<unsigned>(v);
  int row = 0;
  const auto write = [&](int64_t result) { out[32 * row++ + lane] = result; };
  write(__ballot_sync(kAllLanes, v > 0));
  write(__any_sync(kAllLanes, v == in[17]));
  write(__all_sync(kAllLanes, v > -1000));
  write(__match_any_sync(kAllLanes, v));
  write(__reduce_add_sync(kAllLanes, v));
  write(__reduce_min_sync(kAllLanes, v));
  write(__reduce_max_sync(kAllLanes, u));
  write(__reduce_and_sync(kAllLanes, u));
  write(__reduce_or_sync(kAllLanes, u));
  write(__reduce_xor_sync(kAllLanes, u));
  // Lanes of equal value reduce among themselves: masks differ at one place in the code.
  write(__reduce_add_sync(__match_any_sync(kAllLanes, v), lane));
}

}  // namespace

extern "C" cudaError_t check_shuffles(const int64_t* in, int64_t* out) {
  return launch(shuffle_kernel, 1, 32, 0, nullptr, in, out);
}

extern "C" cudaError_t check_votes(const int* in, int64_t* out) {
  return launch(vote_kernel, 1, 32, 0, nullptr, in, out);
}

}  // namespace diffullama
