// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

namespace diffullama {
namespace {

struct Row {
  int value[kCount];
};

template <bool kFaulty>
__global__ void missing_warp_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  row.value[i] = in[i];
  if (!kFaulty) __syncwarp();
  out[i] = row.value[i ^ 1];
}

// A shuffle between the write and the read orders no memory.
template <bool kFaulty>
__global__ void shuffle_as_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  row.value[i] = in[i];
  const int other = __shfl_xor_sync(kAllLanes, i, 1);
  if (!kFaulty) __syncwarp();
  out[i] = row.value[other];
}

template <bool kFaulty>
__global__ void divergent_warp(const int* in, int* out) {
  const int i = threadIdx.x;
  if (kFaulty && i % 2) {
    out[i] = __shfl_xor_sync(kAllLanes, in[i], 2);
  } else {
    out[i] = __shfl_xor_sync(kAllLanes, in[i], 1);
  }
}

// Lane 16 is read by the others, but does not take part.
template <bool kFaulty>
__global__ void shuffle_outside_mask(const int* in, int* out) {
  const int i = threadIdx.x;
  out[i] = in[i];
  if (i % kWarp != 16 || !kFaulty) {
    out[i] = __shfl_sync(kFaulty ? ~(1u << 16) : kAllLanes, in[i], 16);
  }
}

template <bool kFaulty>
__global__ void exited_lane(const int* in, int* out) {
  const int i = threadIdx.x;
  out[i] = in[i];
  if (kFaulty && i == 40) return;
  out[i] = __shfl_down_sync(kAllLanes, in[i], 1);
}

// The lanes that got here are named by hand, one of them wrongly.
template <bool kFaulty>
__global__ void different_masks(const int* in, int* out) {
  const int i = threadIdx.x;
  out[i] = __any_sync(kFaulty && i % kWarp == 3 ? 0xfu : kAllLanes, in[i] < 0) + in[i];
}

int same(int i) { return i; }
int neighbour(int i) { return i ^ 1; }

}  // namespace

std::vector<Fault> warp_faults() {
  return {
      {"missing_warp_barrier", missing_warp_barrier<false>, missing_warp_barrier<true>, neighbour},
      {"shuffle_as_barrier", shuffle_as_barrier<false>, shuffle_as_barrier<true>, neighbour},
      {"divergent_warp", divergent_warp<false>, divergent_warp<true>, neighbour},
      {"shuffle_outside_mask", shuffle_outside_mask<false>, shuffle_outside_mask<true>,
       [](int i) { return i / kWarp * kWarp + 16; }},
      {"exited_lane", exited_lane<false>, exited_lane<true>, [](int i) { return i % kWarp == 31 ? i : i + 1; }},
      {"different_masks", different_masks<false>, different_masks<true>, same},
  };
}

}  // namespace diffullama
