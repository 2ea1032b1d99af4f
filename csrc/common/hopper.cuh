// SPDX-License-Identifier: Apache-2.0
// mbarrier, TMA loads, wgmma and setmaxnreg of sm_90a, each with a device body and a simulator body
// (csrc/testing/hopper.h). For files that are compiled for sm_90a alone.
//
// Operands of wgmma are tiles of 16-bit elements in panels [rows, 64], 128 bytes a row, as a TMA load with
// CU_TENSOR_MAP_SWIZZLE_128B lays them out: bits 4 to 6 of a shared address are exclusive-ored with bits 7 to 9. A
// panel begins at a multiple of kSwizzleBytes. Layouts: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "simt.cuh"

#if defined(DIFFULLAMA_SIMULATED)
#include "../testing/hopper.h"
#endif

namespace diffullama {

constexpr int kWarpgroup = 128;      // threads; the first of a warpgroup is a multiple of it
constexpr int kSwizzleBytes = 1024;  // after which the swizzle's pattern repeats
constexpr int kPanel = 64;           // elements of a row of 128 bytes

// Where a shared variable lies in the block's shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* variable) {
#if defined(DIFFULLAMA_SIMULATED)
  return simulator::shared_address(variable);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(variable));
#endif
}

// The dynamic shared memory from its first multiple of kSwizzleBytes: ask for that many bytes more.
template <class T = unsigned char>
__device__ __forceinline__ T* swizzled_shared() {
  unsigned char* const begin = dynamic_shared();
  return reinterpret_cast<T*>(begin + (0u - shared_address(begin)) % kSwizzleBytes);
}

// --- mbarrier: a phase ends when all arrivals have come and all expected bytes; phases alternate in parity, from 0

struct alignas(8) Mbarrier {
  uint64_t state;
};

// One thread; then mbarrier_init_fence and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int arrivals) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::mbarrier_init(&barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
#if !defined(DIFFULLAMA_SIMULATED)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::mbarrier_arrive(&barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
#endif
}

// Arrives, and lets the phase end only after so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::mbarrier_arrive(&barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
#endif
}

// Waits until the phase of this parity has ended; what was written before its arrivals, and its copies, are visible
// then.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, int parity,
                                              [[maybe_unused]] Site site = Site::here()) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::mbarrier_wait(&barrier, parity, site);
#else
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
#endif
}

// --- TMA

// Starts copying the box of the map whose first element has these coordinates, innermost first; one thread. Elements
// outside the tensor become zeros. The barrier gets the bytes of the whole box.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, Mbarrier& barrier, int x, int y, int z,
                                         int w) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::tma_load(shared, map, &barrier, {x, y, z, w});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

// Starts copying bytes that lie together, a multiple of 16 at aligned addresses; one thread. The barrier gets them.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, Mbarrier& barrier) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::bulk_load(shared, global, bytes, &barrier);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
#endif
}

// What this thread wrote to shared memory is visible to wgmma and TMA that a barrier lets begin after this.
__device__ __forceinline__ void fence_async_proxy() {
#if !defined(DIFFULLAMA_SIMULATED)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map) {
#if defined(DIFFULLAMA_SIMULATED)
  static_cast<void>(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// --- registers of a warpgroup: a multiple of 8 from 24 to 256 each thread; all its warps call

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
#if !defined(DIFFULLAMA_SIMULATED)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
#if !defined(DIFFULLAMA_SIMULATED)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// --- wgmma: products of a warpgroup's four warps. Registers that are given to one belong to it from wgmma_fence until
// the wgmma_wait that names them. Thread 32 w + 4 g + q holds of a [64, 8 n] accumulator d[n][2 r + c] = (16 w + 8 r +
// g, 8 n + 2 q + c), and of a [64, 16] left operand the fragments of mma_m16n8k16 (tensor_core.cuh) for rows 16 w on.

// A right operand's or left operand's place in shared memory. From one group of eight rows to the next: 1024 bytes.
// From one panel to the next: panel_bytes, where an operand that is transposed spans several.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* first, int panel_bytes = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{kSwizzleBytes >> 4} << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         (shared_address(first) & 0x3ffff) >> 4;
}

// The matrix that begins so many bytes later. The address is in the lower half, and no sum leaves it.
__device__ __forceinline__ uint64_t matrix_after(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4);
  return (descriptor & ~uint64_t{0xffffffff}) | low;
}

// Neither the compiler nor this thread touches the registers across here.
template <int kN>
__device__ __forceinline__ void hold_registers([[maybe_unused]] float (&d)[kN][4]) {
#if !defined(DIFFULLAMA_SIMULATED)
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
#endif
}
template <int kN>
__device__ __forceinline__ void hold_registers([[maybe_unused]] uint32_t (&a)[kN][4]) {
#if !defined(DIFFULLAMA_SIMULATED)
#pragma unroll
  for (int n = 0; n < kN; ++n) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
#endif
}

// Before the first wgmma that uses registers which were written otherwise.
template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (hold_registers(registers), ...);
#if defined(DIFFULLAMA_SIMULATED)
  simulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of the products since the last one.
__device__ __forceinline__ void wgmma_commit() {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for all but the kLeft groups closed last, which are done with these registers and their shared memory.
template <int kLeft, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
#if defined(DIFFULLAMA_SIMULATED)
  simulator::wgmma_wait(kLeft, simulator::Site::here());
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
  (hold_registers(registers), ...);
}

// What makes this number, never negative, is done before what follows: ptxas moves a wgmma_wait up past arithmetic that
// does not touch the registers it names, and then nothing runs beside the products. A branch holds it.
__device__ __forceinline__ void settle([[maybe_unused]] float v) {
#if !defined(DIFFULLAMA_SIMULATED)
  if (v < 0.0f) asm volatile("nanosleep.u32 0;" ::: "memory");
#endif
}

#if !defined(DIFFULLAMA_SIMULATED)
#define DIFFULLAMA_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define DIFFULLAMA_D64                                                                                  \
  DIFFULLAMA_D(0), DIFFULLAMA_D(1), DIFFULLAMA_D(2), DIFFULLAMA_D(3), DIFFULLAMA_D(4), DIFFULLAMA_D(5), \
      DIFFULLAMA_D(6), DIFFULLAMA_D(7)
#define DIFFULLAMA_D128                                                                                   \
  DIFFULLAMA_D64, DIFFULLAMA_D(8), DIFFULLAMA_D(9), DIFFULLAMA_D(10), DIFFULLAMA_D(11), DIFFULLAMA_D(12), \
      DIFFULLAMA_D(13), DIFFULLAMA_D(14), DIFFULLAMA_D(15)
#define DIFFULLAMA_NAMES64                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define DIFFULLAMA_NAMES128                                                                                     \
  DIFFULLAMA_NAMES64                                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Operands after the accumulators: a (one descriptor or four registers), b, whether to accumulate, b transposed, and,
// of a in shared memory, a transposed, which PTX wants before b.
#define DIFFULLAMA_WGMMA(n, type, names, a, b, accumulate, after)                                                     \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
  " {" names "}, " a ", " b ", p, 1, 1, " after ";\n}\n"
#define DIFFULLAMA_WGMMA_SHARED64(type) \
  DIFFULLAMA_WGMMA("64", type, DIFFULLAMA_NAMES64, "%32", "%33", "%34", "%36, %35")
#define DIFFULLAMA_WGMMA_SHARED128(type) \
  DIFFULLAMA_WGMMA("128", type, DIFFULLAMA_NAMES128, "%64", "%65", "%66", "%68, %67")
#define DIFFULLAMA_WGMMA_REGISTERS64(type) \
  DIFFULLAMA_WGMMA("64", type, DIFFULLAMA_NAMES64, "{%32, %33, %34, %35}", "%36", "%37", "%38")
#define DIFFULLAMA_WGMMA_REGISTERS128(type) \
  DIFFULLAMA_WGMMA("128", type, DIFFULLAMA_NAMES128, "{%64, %65, %66, %67}", "%68", "%69", "%70")
#endif

// d = a b, or d + a b: a [64, 16] rows of a panel, or, where kLeftTransposed, stored as its transpose, [16 rows, 64]; b
// [16, 8 kN] stored as its transpose, rows of a panel, or, where kTransposed, [16 rows, 8 kN] across panels.
template <class T, bool kTransposed, bool kLeftTransposed = false, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN][4], uint64_t a, uint64_t b, bool accumulate,
                                      [[maybe_unused]] Site site = Site::here()) {
  static_assert(kN == 8 || kN == 16, "64 or 128 columns");
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static_assert(kIsHalf || std::is_same_v<T, __nv_bfloat16>, "wgmma multiplies fp16 or bf16");
#if defined(DIFFULLAMA_SIMULATED)
  simulator::wgmma({a, b, false, kLeftTransposed, kTransposed, accumulate, kIsHalf, 8 * kN}, &d[0][0], nullptr, site);
#else
#define DIFFULLAMA_INPUTS                                                                \
  "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposed)), \
      "n"(static_cast<int>(kLeftTransposed))
  if constexpr (kN == 8 && kIsHalf) {
    asm volatile(DIFFULLAMA_WGMMA_SHARED64("f16") : DIFFULLAMA_D64 : DIFFULLAMA_INPUTS);
  } else if constexpr (kN == 8) {
    asm volatile(DIFFULLAMA_WGMMA_SHARED64("bf16") : DIFFULLAMA_D64 : DIFFULLAMA_INPUTS);
  } else if constexpr (kIsHalf) {
    asm volatile(DIFFULLAMA_WGMMA_SHARED128("f16") : DIFFULLAMA_D128 : DIFFULLAMA_INPUTS);
  } else {
    asm volatile(DIFFULLAMA_WGMMA_SHARED128("bf16") : DIFFULLAMA_D128 : DIFFULLAMA_INPUTS);
  }
#undef DIFFULLAMA_INPUTS
#endif
}

// The same with a in registers.
template <class T, bool kTransposed, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                                      [[maybe_unused]] Site site = Site::here()) {
  static_assert(kN == 8 || kN == 16, "64 or 128 columns");
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static_assert(kIsHalf || std::is_same_v<T, __nv_bfloat16>, "wgmma multiplies fp16 or bf16");
#if defined(DIFFULLAMA_SIMULATED)
  simulator::wgmma({0, b, true, false, kTransposed, accumulate, kIsHalf, 8 * kN}, &d[0][0], a, site);
#else
#define DIFFULLAMA_INPUTS                                                                \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
      "n"(static_cast<int>(kTransposed))
  if constexpr (kN == 8 && kIsHalf) {
    asm volatile(DIFFULLAMA_WGMMA_REGISTERS64("f16") : DIFFULLAMA_D64 : DIFFULLAMA_INPUTS);
  } else if constexpr (kN == 8) {
    asm volatile(DIFFULLAMA_WGMMA_REGISTERS64("bf16") : DIFFULLAMA_D64 : DIFFULLAMA_INPUTS);
  } else if constexpr (kIsHalf) {
    asm volatile(DIFFULLAMA_WGMMA_REGISTERS128("f16") : DIFFULLAMA_D128 : DIFFULLAMA_INPUTS);
  } else {
    asm volatile(DIFFULLAMA_WGMMA_REGISTERS128("bf16") : DIFFULLAMA_D128 : DIFFULLAMA_INPUTS);
  }
#undef DIFFULLAMA_INPUTS
#endif
}

#if !defined(DIFFULLAMA_SIMULATED)
#undef DIFFULLAMA_D
#undef DIFFULLAMA_D64
#undef DIFFULLAMA_D128
#undef DIFFULLAMA_NAMES64
#undef DIFFULLAMA_NAMES128
#undef DIFFULLAMA_WGMMA
#undef DIFFULLAMA_WGMMA_SHARED64
#undef DIFFULLAMA_WGMMA_SHARED128
#undef DIFFULLAMA_WGMMA_REGISTERS64
#undef DIFFULLAMA_WGMMA_REGISTERS128
#endif

}  // namespace diffullama
