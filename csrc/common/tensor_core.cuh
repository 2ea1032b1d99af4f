// SPDX-License-Identifier: Apache-2.0
// cp.async, ldmatrix and mma.sync of sm_80, each with a device body and a simulator body. Every lane of the warp calls
// ldmatrix and mma. g = lane / 4 and q = lane % 4 name a lane's place in a fragment (PTX ISA, "Matrix Fragments").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "simt.cuh"

#if defined(DIFFULLAMA_SIMULATED)
#include "../testing/tensor_core.h"
#endif

namespace diffullama {

// --- asynchronous copies from global to shared memory

// Starts copying kBytes (4, 8 or 16: the alignment of both addresses too), of which the first n_valid are read and the
// others are zeros. Visible to this thread after cp_async_wait, to others after a barrier that follows it.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int n_valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(DIFFULLAMA_SIMULATED)
  simulator::copy_async(shared, global, kBytes, static_cast<size_t>(n_valid));
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(n_valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(n_valid)
                 : "memory");
  }
#endif
}

// Closes the group of the copies started since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all but the kLeft groups closed last.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait() {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::wait_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// --- fragments

// kCount (1, 2 or 4) matrices of 8 x 8 16-bit elements from shared memory. Lane i points to row i % 8 of matrix i / 8,
// 16 aligned bytes (lanes past the matrices: ignored). fragment[m] packs elements (g, 2q) and (g, 2q + 1) of matrix m,
// of its transpose if kTranspose; the first is in the low half.
template <int kCount, bool kTranspose = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[kCount], const void* row,
                                         [[maybe_unused]] Site site = Site::here()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
#if defined(DIFFULLAMA_SIMULATED)
  simulator::ldmatrix<kCount, kTranspose>(fragment, row, site);
#else
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  uint32_t (&r)[kCount] = fragment;
  if constexpr (kCount == 1 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (kCount == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// c += a b for a [16, 16], b [16, 8], c [16, 8]; T is __half or __nv_bfloat16, two a register, low half first.
//   a[0..3]: (g, 2q), (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8), each with the next column
//   b[0..1]: (2q, g), (2q + 8, g), each with the next row
//   c[0..3]: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             [[maybe_unused]] Site site = Site::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "mma multiplies fp16 or bf16");
#if defined(DIFFULLAMA_SIMULATED)
  simulator::mma_m16n8k16<T>(c, a, b, site);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace diffullama
