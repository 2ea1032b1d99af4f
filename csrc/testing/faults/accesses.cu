// SPDX-License-Identifier: Apache-2.0
#include "../../common/tensor_core.cuh"
#include "faults.h"

namespace diffullama {
namespace {

struct alignas(16) Row {
  int value[kCount];
};

template <bool kFaulty>
__global__ void shifted_index(const int* in, int* out) {
  const int i = threadIdx.x;
  out[i] = in[i + kFaulty];
}

// The grid is larger than the data.
template <bool kFaulty>
__global__ void dropped_bound(const int* in, int* out) {
  for (int i = threadIdx.x; kFaulty ? i < kCount + 8 : i < kCount; i += blockDim.x) out[i] = in[i % kCount];
}

template <bool kFaulty>
__global__ void shared_overflow(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  row.value[i] = in[i];
  __syncthreads();
  const int* value = row.value;
  out[i] = value[kFaulty && i == kCount - 1 ? kCount : i];
}

// A counter that nobody clears.
template <bool kFaulty>
__global__ void uninitialised_shared(const int* in, int* out) {
  struct Counter {
    int n;
  };
  Counter& counter = static_shared<Counter>();
  const int i = threadIdx.x;
  if (!kFaulty && i == 0) counter.n = 0;
  __syncthreads();
  atomicAdd(&counter.n, 1);
  __syncthreads();
  out[i] = in[i] + counter.n;
}

template <bool kFaulty>
__global__ void missing_copy_wait(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  cp_async<4>(&row.value[i], &in[i]);
  cp_async_commit();
  if (!kFaulty) cp_async_wait<0>();
  __syncthreads();
  out[i] = row.value[kCount - 1 - i];
}

// The wait is there, the barrier that shows the copies to other threads is not.
template <bool kFaulty>
__global__ void missing_copy_barrier(const int* in, int* out) {
  Row& row = static_shared<Row>();
  const int i = threadIdx.x;
  cp_async<4>(&row.value[i], &in[i]);
  cp_async_commit();
  cp_async_wait<0>();
  if (!kFaulty) __syncthreads();
  out[i] = row.value[kCount - 1 - i];
}

template <bool kFaulty>
__global__ void misaligned_vector(const int* in, int* out) {
  const int i = threadIdx.x;
  if (i % 4 == 0) {
    const int4 v = *reinterpret_cast<const int4*>(in + (kFaulty && i == 4 ? i + 1 : i));
    *reinterpret_cast<int4*>(out + i) = v;
  }
}

template <bool kFaulty>
__global__ void shift_too_far(const int* in, int* out) {
  const int i = threadIdx.x;
  out[i] = in[i] + (1 << (kFaulty ? in[i] % 64 : in[i] % 31));
}

int same(int i) { return i; }
int reversed(int i) { return kCount - 1 - i; }

}  // namespace

std::vector<Fault> access_faults() {
  return {
      {"shifted_index", shifted_index<false>, shifted_index<true>, same},
      {"dropped_bound", dropped_bound<false>, dropped_bound<true>, same},
      {"shared_overflow", shared_overflow<false>, shared_overflow<true>, same},
      {"uninitialised_shared", uninitialised_shared<false>, uninitialised_shared<true>,
       [](int i) { return i + kCount; }},
      {"missing_copy_wait", missing_copy_wait<false>, missing_copy_wait<true>, reversed},
      {"missing_copy_barrier", missing_copy_barrier<false>, missing_copy_barrier<true>, reversed},
      {"misaligned_vector", misaligned_vector<false>, misaligned_vector<true>, same},
      {"shift_too_far", shift_too_far<false>, shift_too_far<true>, [](int i) { return i + (1 << i % 31); }},
  };
}

}  // namespace diffullama
