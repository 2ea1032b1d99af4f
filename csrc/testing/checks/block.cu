// SPDX-License-Identifier: Apache-2.0
// Barriers, shared memory, atomics, clusters and grids, each in a kernel whose result needs it.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../../attention/attention_query_sums.cuh"
#include "../../common/cuda_block.cuh"
#include "../../common/launch.h"

namespace diffullama {
namespace {

constexpr int kThreads = 256;

struct SumShared {
  int64_t sum[kThreads / kWarp];
  int scan[kThreads / kWarp];
};

// totals[block] and the exclusive scan of the block's 256 values.
__global__ void sum_scan_kernel(const int* in, int64_t* totals, int* before) {
  SumShared& shared = static_shared<SumShared>();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const int64_t total = block_sum<kThreads>(in[i], shared.sum);
  int scan_total;
  before[i] = block_exclusive_scan<kThreads>(in[i], shared.scan, scan_total);
  if (threadIdx.x == 0) totals[blockIdx.x] = total == scan_total ? total : -1;
}

// Reverses a row of n values through dynamic shared memory; votes[3 * block ...] are count, or, and of in > 0.
__global__ void reverse_kernel(const int* in, int* out, int* votes, int n) {
  int* row = dynamic_shared<int>();
  const int64_t base = int64_t{blockIdx.x} * n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = in[base + i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[base + i] = row[n - 1 - i];
  const bool positive = in[base + threadIdx.x % n] > 0;
  const int count = __syncthreads_count(positive), any = __syncthreads_or(positive), all = __syncthreads_and(positive);
  if (threadIdx.x == 0) {
    votes[3 * blockIdx.x] = count;
    votes[3 * blockIdx.x + 1] = any;
    votes[3 * blockIdx.x + 2] = all;
  }
}

// One warp produces, the others consume; "full" is barrier 1, "empty" barrier 2.
__global__ void pipeline_kernel(const int* in, int* out, int n_steps) {
  struct Stage {
    int value[kWarp];
  };
  Stage& stage = static_shared<Stage>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, n_threads = blockDim.x;
  for (int step = 0; step < n_steps; ++step) {
    if (warp == 0) {
      if (step > 0) barrier_sync(2, n_threads);
      stage.value[lane] = in[step * kWarp + lane];
      barrier_arrive(1, n_threads);
    } else {
      barrier_sync(1, n_threads);
      const int64_t at = (int64_t{step} * (n_threads / kWarp - 1) + warp - 1) * kWarp + lane;
      out[at] = stage.value[lane ^ 1] * warp;
      if (step + 1 < n_steps) barrier_arrive(2, n_threads);
    }
  }
}

// out: sum, min, max, or, and, xor of int32, then of a 64-bit sum, a CAS-built maximum, and how many saw the exchange.
__global__ void atomic_kernel(const int* in, int* out, unsigned long long* wide, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&out[0], in[i]);
  atomicMin(&out[1], in[i]);
  atomicMax(&out[2], in[i]);
  atomicOr(&out[3], in[i]);
  atomicAnd(&out[4], in[i]);
  atomicXor(&out[5], in[i]);
  atomicAdd(&wide[0], static_cast<unsigned long long>(static_cast<long long>(in[i])));
  int seen = out[6];
  while (seen < in[i]) {
    const int old = atomicCAS(&out[6], seen, in[i]);
    if (old == seen) break;
    seen = old;
  }
  if (atomicExch(&out[7], 1) == 0) atomicAdd(&out[8], 1);
}

// one += in[i] and four += {1, 2, 3, 4} * in[i], of every thread.
__global__ void reduce_kernel(const float* in, float* one, float* four, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  reduce_add(one, in[i]);
  reduce_add(four, make_float4(in[i], 2 * in[i], 3 * in[i], 4 * in[i]));
}

// Block k by its ticket adds in[k] to those of n sums that it visits, in turn: the order of the additions is that of k.
__global__ void turns_kernel(const float* in, float* sums, int* counters, int n) {
  struct Shared {
    int ticket;
  };
  Shared& shared = static_shared<Shared>();
  const QueryTurns turns{counters};
  if (threadIdx.x == 0) shared.ticket = turns.ticket();
  __syncthreads();
  const int k = shared.ticket;
  for (int i = 0; i < n; ++i) {
    const auto visits = [&](int block) { return (block + i) % 3 != 1; };
    if (!visits(k)) continue;
    const int turn = QueryTurns::turn(k, visits);
    if (threadIdx.x == 0) turns.wait(i, turn);
    __syncthreads();
    reduce_add(sums + i * kWarp + threadIdx.x, in[k]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) turns.pass(i, turn);
  }
}

struct ClusterShared {
  int value;
};

// Each block's number plus those of the others of its cluster, read from their shared memory.
__global__ void cluster_kernel(const int* in, int* out) {
  ClusterShared& shared = static_shared<ClusterShared>();
  if (threadIdx.x == 0) shared.value = in[blockIdx.x];
  cluster_sync();
  int sum = 0;
  for (int rank = 0; rank < cluster_size(); ++rank) {
    sum += (rank == cluster_rank() + 1 ? 10 : 1) * shared_of_rank(&shared, rank)->value;
  }
  cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// values[i] = sum of all earlier passes' neighbours: wrong without the grid's barrier.
__global__ void grid_kernel(int* a, int* b, int n_passes) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int pass = 0; pass < n_passes; ++pass) {
    b[i] = a[i] + a[(i + blockDim.x) % n];
    cooperative_groups::this_grid().sync();
    int* swap = a;
    a = b;
    b = swap;
  }
}

// Blocks take tickets and add their value to the sum their predecessor published (-1: not yet).
__global__ void chain_kernel(const int* in, unsigned* ticket, int64_t* published) {
  if (threadIdx.x != 0) return;
  const unsigned mine = atomicAdd(ticket, 1u);
  int64_t before = 0;
  if (mine > 0) {
    do {
      before = load_acquire(&published[mine - 1]);
    } while (before < 0);
  }
  store_release(&published[mine], before + in[mine]);
}

// The order in which blocks began.
__global__ void order_kernel(unsigned* ticket, int64_t* order) { order[atomicAdd(ticket, 1u)] = blockIdx.x; }

}  // namespace

extern "C" {

cudaError_t check_sum_scan(const int* in, int64_t* totals, int* before, int blocks) {
  return launch(sum_scan_kernel, blocks, kThreads, 0, nullptr, in, totals, before);
}

cudaError_t check_reverse(const int* in, int* out, int* votes, int blocks, int threads, int n) {
  return launch(reverse_kernel, blocks, threads, n * sizeof(int), nullptr, in, out, votes, n);
}

cudaError_t check_pipeline(const int* in, int* out, int n_steps, int warps) {
  return launch(pipeline_kernel, 1, warps * kWarp, 0, nullptr, in, out, n_steps);
}

cudaError_t check_atomics(const int* in, int* out, unsigned long long* wide, int n) {
  return launch(atomic_kernel, (n + 63) / 64, 64, 0, nullptr, in, out, wide, n);
}

cudaError_t check_reduce(const float* in, float* one, float* four, int n) {
  return launch(reduce_kernel, (n + 63) / 64, 64, 0, nullptr, in, one, four, n);
}

cudaError_t check_turns(const float* in, float* sums, int* counters, int blocks, int n) {
  return launch_cooperative(turns_kernel, blocks, kWarp, 0, nullptr, in, sums, counters, n);
}

cudaError_t check_cluster(const int* in, int* out, int blocks, int cluster) {
  return launch_cluster(cluster, cluster_kernel, blocks, 64, 0, nullptr, in, out);
}

cudaError_t check_grid(int* a, int* b, int blocks, int threads, int n_passes) {
  return launch_cooperative(grid_kernel, blocks, threads, 0, nullptr, a, b, n_passes);
}

cudaError_t check_chain(const int* in, unsigned* ticket, int64_t* published, int blocks) {
  return launch(chain_kernel, blocks, 32, 0, nullptr, in, ticket, published);
}

cudaError_t check_order(unsigned* ticket, int64_t* order, int blocks) {
  return launch(order_kernel, blocks, 1, 0, nullptr, ticket, order);
}

cudaError_t check_resident(int threads, size_t shared_bytes, int64_t* blocks) {
  return resident_blocks(grid_kernel, threads, shared_bytes, *blocks);
}

}  // extern "C"
}  // namespace diffullama
