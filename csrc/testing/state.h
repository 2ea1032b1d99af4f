// SPDX-License-Identifier: Apache-2.0
// What the parts of the simulator share: threads, warps, blocks, and who runs. One launch at a time, so all of it is
// one global object.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cuda/vector_types.h"
#include "fiber.h"
#include "hopper.h"
#include "races.h"
#include "simulator.h"

namespace simulator {

constexpr int kWarp = 32, kNamedBarriers = 16;

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;
  size_t size, valid;
  int group;
};

struct Thread {
  Context context;
  Block* block;
  Warp* warp;
  int lane;
  uint3 position;     // in the block
  const char* doing;  // what it waits in, null while it can run
  Site site;
  Thread* next_waiting;
  int barrier_sum;
  std::vector<Copy> copies;
  int copy_group;
  size_t n_wgmma, n_wgmma_waited;    // issued, known to be done
  std::vector<size_t> wgmma_groups;  // where each open group ends
  bool wgmma_fenced;
};

struct Warp {
  Thread* lanes[kWarp];
  Block* block;
  uint32_t runnable = 0, gone = ~0u;
  size_t place;  // in State::active while a lane is runnable
  // The warp-wide operation that each waiting lane is in.
  uint32_t waiting = 0;
  uint32_t mask[kWarp];
  void* data[kWarp];
  Complete complete[kWarp];
};

struct Barrier {
  Thread* waiting = nullptr;  // the first of a list
  int arrived = 0, expected = 0, sum = 0;
  int phase = 0;
  char phases[2];  // for races.h: one use of the barrier and the next have different addresses
  const char* name = nullptr;
  Site site{};
};

struct Mbarrier {
  int arrivals = 0, left = 0;  // of a phase
  int64_t bytes = 0;           // expected and not yet copied
  int parity = 0;
  Thread* waiting = nullptr;
  char phases[2];  // for races.h
};

struct BoxCopy {
  enum class When { kAtOnce, kSoon, kLate };

  CUtensorMap map;  // kernel parameters are gone when their thread ends
  BoxPlace at;
  uint32_t to;  // shared address
  const void* barrier;
  Block* block;
};

struct PendingWgmma {
  Wgmma product;
  Site site;
  int n_threads = 0;
  float* d[128];
  const uint32_t* a[128];

  PendingWgmma(const Wgmma& product, Site site) : product(product), site(site) {}
};

struct Warpgroup {
  std::deque<PendingWgmma> ops;
  size_t first = 0, n_done[4] = {};  // numbers of ops.front(), and of the first that has not been performed by warp
  Thread* waiting = nullptr;         // for others to issue
};

struct Chunk {
  const void* key;
  char* data;
  size_t size, alignment;
};

struct Block {
  uint3 position;
  int rank;  // in its cluster
  int n_gone = 0;
  Barrier barriers[kNamedBarriers];
  std::vector<Warp> warps;
  std::vector<Chunk> shared;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<Warpgroup> warpgroups;

  Block() = default;
  Block(Block&&) = default;
  ~Block() {
    const NoRaces scope;
    for (const Chunk& c : shared) ::operator delete(c.data, std::align_val_t{c.alignment});
  }
};

// Who runs next: any warp, the same warp while it can, or any warp of the same block. Races differ in which they need.
enum class Favour { kNone, kWarp, kBlock };

// One launch at a time uses this.
struct State {
  Shape shape{};
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;  // alive: one, a cluster, or the grid
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp*> active;                 // those with runnable lanes
  std::vector<BoxCopy> copies, late_copies;  // TMA loads under way; the late ones wait until nobody can run, or spin
  Favour favour = Favour::kNone;
  Thread* current = nullptr;
  size_t n_alive = 0;
  Barrier whole;  // the cluster's or the grid's
  std::unique_ptr<Context> host;
  StackPool stacks;
  uint64_t random = 0, n_launches = 0, visits = 0;
  std::string error;
};

extern State state;

uint64_t next_random();
size_t random_below(size_t n);
int threads_per_block();

// --- scheduling (scheduler.cpp)
void make_runnable(Thread& thread);
void run_next(Context& from, bool from_ends);  // suspends `from`, which has arranged to be made runnable or ends
void wait_in(const char* name, Site site);     // suspends the running thread until somebody makes it runnable
void favour_anew();

// --- shared memory (memory.cpp): the chunk of that key, made if it is new
void* shared_chunk(Block& block, const void* key, size_t size, size_t alignment);

// --- TMA (hopper.cpp): performs one of the loads under way; false if there is none
bool perform_a_copy(bool late);

// --- for messages
std::string text(uint3 position);
std::string text(const char* name, Site site);
std::string text(const Thread& thread);

}  // namespace simulator
