// SPDX-License-Identifier: Apache-2.0
// The only compiler switches of the library.
#pragma once

#if defined(__CUDACC__)
#define DIFFULLAMA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DIFFULLAMA_HOST_DEVICE inline
#endif

// A loop function compiled for three x86-64 levels, chosen when the library is loaded. No contraction to FMA and a
// fixed number of accumulators (kLanes) keep the results of all three bitwise equal.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define DIFFULLAMA_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DIFFULLAMA_VECTORIZED
#endif
