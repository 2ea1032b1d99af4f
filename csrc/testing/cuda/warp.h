// SPDX-License-Identifier: Apache-2.0
// Warp shuffles, votes, matches and reductions.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "../races.h"
#include "../simulator.h"

namespace simulator {

// Each lane names the lane it reads; reading one that does not take part is an error.
struct Shuffle {
  uint64_t value, result;
  int source;

  SIMULATOR_NO_RACES static void complete(Shuffle* const* lanes, uint32_t mask) {
    for (int k = 0; k < 32; ++k) {
      if (!(mask >> k & 1)) continue;
      if (!(mask >> lanes[k]->source & 1)) {
        fail("shuffle: lane " + std::to_string(k) + " reads lane " + std::to_string(lanes[k]->source) +
             ", which the mask does not name");
      }
      lanes[k]->result = lanes[lanes[k]->source]->value;
    }
  }
};

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves up to 64 bits");
  Shuffle lane{0, 0, source};
  std::memcpy(&lane.value, &value, sizeof value);
  warp_collective(name, mask, lane, site);
  std::memcpy(&value, &lane.result, sizeof value);
  return value;
}

// Bit k of every lane's result: lane k's value equals its own.
struct Match {
  uint64_t value;
  uint32_t result;

  SIMULATOR_NO_RACES static void complete(Match* const* lanes, uint32_t mask) {
    for (int k = 0; k < 32; ++k) {
      if (!(mask >> k & 1)) continue;
      lanes[k]->result = 0;
      for (int j = 0; j < 32; ++j) {
        if ((mask >> j & 1) && lanes[j]->value == lanes[k]->value) lanes[k]->result |= 1u << j;
      }
    }
  }
};

// Left fold in lane order.
template <class T, class Op>
struct Reduce {
  T value;

  SIMULATOR_NO_RACES static void complete(Reduce* const* lanes, uint32_t mask) {
    const int first = __builtin_ctz(mask);
    T total = lanes[first]->value;
    for (int k = first + 1; k < 32; ++k) {
      if (mask >> k & 1) total = Op::of(total, lanes[k]->value);
    }
    for (int k = first; k < 32; ++k) {
      if (mask >> k & 1) lanes[k]->value = total;
    }
  }
};

template <class Op, class T>
T reduce(const char* name, uint32_t mask, T value, Site site) {
  Reduce<T, Op> lane{value};
  warp_collective(name, mask, lane, site);
  return lane.value;
}

struct Add {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return b < a ? b : a;
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return a < b ? b : a;
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};

}  // namespace simulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simulator::Site site = simulator::Site::here()) {
  const int lane = simulator::lane_of_thread();
  return simulator::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 simulator::Site site = simulator::Site::here()) {
  const int lane = simulator::lane_of_thread(), source = lane - static_cast<int>(delta);
  return simulator::shuffle("__shfl_up_sync", mask, value, source < (lane & -width) ? lane : source, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   simulator::Site site = simulator::Site::here()) {
  const int lane = simulator::lane_of_thread(), source = lane + static_cast<int>(delta);
  return simulator::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  simulator::Site site = simulator::Site::here()) {
  const int lane = simulator::lane_of_thread(), source = lane ^ lane_mask;
  return simulator::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}

// Of the warp-wide operations, this one alone orders memory.
inline void __syncwarp(unsigned mask = ~0u, simulator::Site site = simulator::Site::here()) {
  simulator::publish(simulator::warp_of_thread());
  simulator::reduce<simulator::Or>("__syncwarp", mask, 0u, site);
  simulator::observe(simulator::warp_of_thread());
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simulator::Site site = simulator::Site::here()) {
  const unsigned bit = predicate != 0 ? 1u << simulator::lane_of_thread() : 0u;
  return simulator::reduce<simulator::Or>("__ballot_sync", mask, bit, site);
}
inline int __any_sync(unsigned mask, int predicate, simulator::Site site = simulator::Site::here()) {
  return simulator::reduce<simulator::Or>("__any_sync", mask, predicate != 0 ? 1 : 0, site);
}
inline int __all_sync(unsigned mask, int predicate, simulator::Site site = simulator::Site::here()) {
  return simulator::reduce<simulator::And>("__all_sync", mask, predicate != 0 ? 1 : 0, site);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, simulator::Site site = simulator::Site::here()) {
  static_assert(std::is_arithmetic_v<T>, "matches compare 32- or 64-bit numbers");
  simulator::Match lane{0, 0};
  std::memcpy(&lane.value, &value, sizeof value);
  simulator::warp_collective("__match_any_sync", mask, lane, site);
  return lane.result;
}

#define SIMULATOR_REDUCE(name, Op, T)                                                     \
  inline T name(unsigned mask, T value, simulator::Site site = simulator::Site::here()) { \
    return simulator::reduce<simulator::Op>(#name, mask, value, site);                    \
  }
SIMULATOR_REDUCE(__reduce_add_sync, Add, unsigned)
SIMULATOR_REDUCE(__reduce_add_sync, Add, int)
SIMULATOR_REDUCE(__reduce_min_sync, Min, unsigned)
SIMULATOR_REDUCE(__reduce_min_sync, Min, int)
SIMULATOR_REDUCE(__reduce_max_sync, Max, unsigned)
SIMULATOR_REDUCE(__reduce_max_sync, Max, int)
SIMULATOR_REDUCE(__reduce_and_sync, And, unsigned)
SIMULATOR_REDUCE(__reduce_or_sync, Or, unsigned)
SIMULATOR_REDUCE(__reduce_xor_sync, Xor, unsigned)
#undef SIMULATOR_REDUCE
