// SPDX-License-Identifier: Apache-2.0
#include <cooperative_groups.h>

#include "faults.h"

namespace diffullama {
namespace {

struct Row {
  int value[kCount];
};

template <bool kFaulty>
__global__ void missing_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  row.value[i] = in[i];
  if (!kFaulty) __syncthreads();
  out[i] = row.value[kCount - 1 - i];
}

// Two passes through one buffer: the second write must wait for the first read.
template <bool kFaulty>
__global__ void missing_reuse_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  int sum = 0;
  for (int pass = 1; pass <= 2; ++pass) {
    row.value[i] = in[i] * pass;
    __syncthreads();
    sum += row.value[kCount - 1 - i];
    if (!kFaulty) __syncthreads();
  }
  out[i] = sum;
}

template <bool kFaulty>
__global__ void missing_grid_barrier(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i];
  if (!kFaulty) cooperative_groups::this_grid().sync();
  const int other = out[kCount - 1 - i];
  cooperative_groups::this_grid().sync();
  out[i] = other;
}

template <bool kFaulty>
__global__ void missing_cluster_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x, n = blockDim.x;
  row.value[i] = in[blockIdx.x * n + i];
  if (!kFaulty) cluster_sync();
  const int other = cluster_size() - 1 - cluster_rank();
  out[blockIdx.x * n + i] = shared_of_rank(&row, other)->value[n - 1 - i];
  cluster_sync();
}

// A block may end while another of its cluster still reads its memory.
template <bool kFaulty>
__global__ void early_cluster_exit(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x, n = blockDim.x;
  row.value[i] = in[blockIdx.x * n + i];
  cluster_sync();
  const int* other = shared_of_rank(&row, cluster_size() - 1 - cluster_rank())->value;
  if (kFaulty && cluster_rank() % 2) __nanosleep(100);
  out[blockIdx.x * n + i] = other[n - 1 - i];
  if (!kFaulty) cluster_sync();
}

template <bool kFaulty>
__global__ void divergent_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  row.value[i] = in[i];
  if (kFaulty && i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[i] = row.value[kCount - 1 - i];
}

template <bool kFaulty>
__global__ void exit_before_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  row.value[i] = out[i] = in[i];
  if (kFaulty && i == 77) return;
  __syncthreads();
  out[i] = row.value[kCount - 1 - i];
}

// The number of passes depends on the thread.
template <bool kFaulty>
__global__ void uneven_loop(const int* in, int* out) {
  const int i = threadIdx.x;
  for (int pass = 0; pass < (kFaulty && i >= 128 ? 3 : 2); ++pass) __syncthreads();
  out[i] = in[i];
}

// Half of the block arrives at a barrier that counts all of it.
template <bool kFaulty>
__global__ void deadlock(const int* in, int* out) {
  const int i = threadIdx.x;
  if (i < kCount / 2) {
    barrier_sync(1, kFaulty ? kCount : kCount / 2);
    barrier_sync(2, kCount);
  } else {
    barrier_sync(2, kCount);
  }
  out[i] = in[i];
}

// A flag that is polled and, if faulty, never set.
template <bool kFaulty>
__global__ void livelock(const int* in, int* out) {
  const int i = threadIdx.x;
  if (i == 0) {
    if (!kFaulty) store_release(&out[kCount - 1], 7);
  } else if (i < kCount - 1) {
    while (load_acquire(&out[kCount - 1]) != 7) {
    }
  }
  if (i < kCount - 1) out[i] = in[i];
}

// Every block adds to one place; blocks run in any order, also at the same time.
template <bool kFaulty>
__global__ void lost_update(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i > 0) out[i] = in[i];
  if (kFaulty) {
    out[0] += 1;
  } else {
    atomicAdd(&out[0], 1);
  }
}

int same(int i) { return i; }
int reversed(int i) { return kCount - 1 - i; }

}  // namespace

std::vector<Fault> barrier_faults() {
  return {
      {"missing_barrier", missing_barrier<false>, missing_barrier<true>, reversed},
      {"missing_reuse_barrier", missing_reuse_barrier<false>, missing_reuse_barrier<true>,
       [](int i) { return 3 * reversed(i); }},
      {"missing_grid_barrier", missing_grid_barrier<false>, missing_grid_barrier<true>, reversed, 4, 1, true},
      {"missing_cluster_barrier", missing_cluster_barrier<false>, missing_cluster_barrier<true>, reversed, 4, 4},
      {"early_cluster_exit", early_cluster_exit<false>, early_cluster_exit<true>, reversed, 4, 4},
      {"divergent_barrier", divergent_barrier<false>, divergent_barrier<true>, reversed},
      {"exit_before_barrier", exit_before_barrier<false>, exit_before_barrier<true>, reversed},
      {"uneven_loop", uneven_loop<false>, uneven_loop<true>, same},
      {"deadlock", deadlock<false>, deadlock<true>, same},
      {"lost_update", lost_update<false>, lost_update<true>, [](int i) { return i > 0 ? i : kCount - 1; }, 4},
      {"livelock", livelock<false>, livelock<true>, [](int i) { return i < kCount - 1 ? i : 7; }},
  };
}

}  // namespace diffullama
