// SPDX-License-Identifier: Apache-2.0
// Integer atomics, and the one sum of floats (common/simt.cuh). Fibers share one operating-system thread, so a load and
// a store are atomic together; another thread may run before them.
#pragma once

#include <type_traits>

#include "../simulator.h"

namespace simulator {

template <class T, class F>
T atomic(T* address, F&& next) {
  scheduling_point();
  const T old = __atomic_load_n(address, __ATOMIC_ACQUIRE);
  __atomic_store_n(address, next(old), __ATOMIC_RELEASE);
  return old;
}

// Orders nothing else: not the memory of threads that add to the same float.
inline void reduce_add(float* to, float value) {
  scheduling_point();
  float sum;
  __atomic_load(to, &sum, __ATOMIC_RELAXED);
  sum += value;
  __atomic_store(to, &sum, __ATOMIC_RELAXED);
}

// Wraps around like the device does.
template <class T>
T wrapping_add(T a, T b) {
  return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
}

}  // namespace simulator

#define SIMULATOR_ATOMIC(name, T, next)                                                   \
  inline T name(T* address, T value) {                                                    \
    return simulator::atomic(address, [=]([[maybe_unused]] T old) -> T { return next; }); \
  }
#define SIMULATOR_ATOMICS(T)                                                                     \
  SIMULATOR_ATOMIC(atomicMin, T, value < old ? value : old)                                      \
  SIMULATOR_ATOMIC(atomicMax, T, old < value ? value : old)                                      \
  SIMULATOR_ATOMIC(atomicAnd, T, old& value)                                                     \
  SIMULATOR_ATOMIC(atomicOr, T, old | value)                                                     \
  SIMULATOR_ATOMIC(atomicXor, T, old ^ value)                                                    \
  SIMULATOR_ATOMIC(atomicExch, T, value)                                                         \
  inline T atomicCAS(T* address, T compare, T value) {                                           \
    return simulator::atomic(address, [=](T old) -> T { return old == compare ? value : old; }); \
  }
SIMULATOR_ATOMICS(int)
SIMULATOR_ATOMICS(unsigned)
SIMULATOR_ATOMICS(unsigned long long)
SIMULATOR_ATOMIC(atomicAdd, int, simulator::wrapping_add(old, value))
SIMULATOR_ATOMIC(atomicAdd, unsigned, old + value)
SIMULATOR_ATOMIC(atomicAdd, unsigned long long, old + value)
SIMULATOR_ATOMIC(atomicSub, int, simulator::wrapping_add(old, -value))
SIMULATOR_ATOMIC(atomicSub, unsigned, old - value)
SIMULATOR_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
#undef SIMULATOR_ATOMIC
#undef SIMULATOR_ATOMICS
