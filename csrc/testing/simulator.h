// SPDX-License-Identifier: Apache-2.0
// Runs a kernel on the CPU: one fiber a thread, blocks in turn (clusters and cooperative grids together). A fiber runs
// until it meets a barrier, a warp-wide operation or an atomic; which one runs next is drawn from a seeded generator.
// What a GPU leaves undefined at a barrier (other threads elsewhere, or gone) ends the launch with an error. The
// headers in cuda/ spell this interface the way CUDA does; kernels include those only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "races.h"

namespace simulator {

// A place in the kernel, for messages and to tell barriers apart.
struct Site {
  const char* file;
  int line;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

// Ends the launch; the running thread's place is put in front of the message.
[[noreturn]] void fail(const std::string& message);

// Other threads may run here. A loop that waits for another thread must pass through one.
void scheduling_point();

// --- barriers; each returns the sum of `value` over its threads
int block_barrier(const char* name, int value, Site site);
int cluster_barrier(Site site);
int grid_barrier(Site site);
void named_barrier(int id, int n_threads, bool waits, Site site);

int lane_of_thread();
const void* warp_of_thread();

// --- warp-wide operations: the last lane of `mask` to arrive runs complete(data of all 32 lanes, mask)
using Complete = void (*)(void* const* lanes, uint32_t mask);
void warp_collective(const char* name, uint32_t mask, void* data, Complete complete, Site site);

// The same for a struct with a static member complete(T* const* lanes, uint32_t mask).
template <class T>
void warp_collective(const char* name, uint32_t mask, T& data, Site site) {
  warp_collective(
      name, mask, &data,
      [](void* const* lanes, uint32_t lane_mask) SIMULATOR_NO_RACES {
        T* typed[32];
        for (int k = 0; k < 32; ++k) typed[k] = lane_mask >> k & 1 ? static_cast<T*>(lanes[k]) : nullptr;
        T::complete(typed, lane_mask);
      },
      site);
}

// --- shared memory of the running block: bytes are 0xff until written
void* static_shared(const void* key, size_t size, size_t alignment);  // the same for the same key
void* dynamic_shared();
void* shared_of_rank(void* mine, int rank);  // the same place in another block of the cluster
int cluster_rank();
int cluster_size();

// --- cp.async: performed at once or as late as wait_copies allows, as the generator decides
void copy_async(void* shared, const void* global, size_t size, size_t valid);
void commit_copies();
void wait_copies(int groups_left);

// --- launching, from the host
struct Shape {
  unsigned grid[3], block[3], cluster;
  size_t shared_bytes;
  bool cooperative;
};

constexpr int kMultiprocessors = 3;  // of the simulated device: an odd number, and few fibers alive
constexpr int kThreadsPerMultiprocessor = 1024;
constexpr size_t kSharedBytesPerBlock = 227 << 10;

// Runs body() once a thread; false if it failed, with last_error() saying why.
bool run(const Shape& shape, const std::function<void()>& body);
const std::string& last_error();

}  // namespace simulator
