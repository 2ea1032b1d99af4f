// SPDX-License-Identifier: Apache-2.0
#include "simulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "cuda/cuda_runtime.h"
#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simulator {
namespace {

constexpr int kWarp = 32, kNamedBarriers = 16;
// Visits of scheduling points without a barrier passed or a thread ended, after which spinning is called hopeless.
constexpr uint64_t kHopeless = 20'000'000;

struct Block;

struct Copy {
  void* to;
  const void* from;
  size_t size, valid;
  int group;
};

struct Thread {
  Context context;
  Block* block;
  uint3 position;
  int index;         // in the block
  const char* doing;  // what it waits in, null while it can run
  Site site;
  int barrier_sum;
  std::vector<Copy> copies;
  int copy_group;
};

struct Warp {
  Thread* lanes[kWarp];
  void* data[kWarp];
  uint32_t mask[kWarp];
  Complete complete[kWarp];
  uint32_t waiting = 0, gone = ~0u;
};

struct Barrier {
  std::vector<Thread*> waiting;
  int arrived = 0, expected = 0, sum = 0;
  const char* name = nullptr;
  Site site{};
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

  Block() = default;
  Block(Block&&) = default;
  ~Block() {
    for (const Chunk& c : shared) ::operator delete(c.data, std::align_val_t{c.alignment});
  }
};

// One launch at a time uses this.
struct State {
  Shape shape{};
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;  // alive: one, a cluster, or the grid
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> runnable;
  Thread* current = nullptr;
  size_t n_alive = 0;
  Barrier whole;  // the cluster's or the grid's
  std::unique_ptr<Context> host;
  StackPool stacks;
  uint64_t random = 0, n_launches = 0, visits = 0;
  std::string error;
};

State state;
std::mutex launching;

uint64_t next_random() {  // splitmix64
  uint64_t z = state.random += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

size_t random_below(size_t n) { return static_cast<size_t>((static_cast<unsigned __int128>(next_random()) * n) >> 64); }

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(const char* name, Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(name) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

std::string text(const Thread& t) { return "block " + text(t.block->position) + " thread " + text(t.position); }

// --- switching

void run_next(Context& from, bool from_ends) {
  if (state.runnable.empty()) {
    state.host->resume(from, from_ends);
    return;
  }
  std::swap(state.runnable[random_below(state.runnable.size())], state.runnable.back());
  Thread* next = state.runnable.back();
  state.runnable.pop_back();
  if (next == state.current && !from_ends) return;
  state.current = next;
  threadIdx = next->position;
  blockIdx = next->block->position;
  next->context.resume(from, from_ends);
}

void wait_in(const char* name, Site site) {
  Thread& self = *state.current;
  self.doing = name;
  self.site = site;
  run_next(self.context, false);
}

void wake(Thread* thread) {
  thread->doing = nullptr;
  state.runnable.push_back(thread);
}

// --- barriers

void release(Barrier& barrier) {
  for (Thread* t : barrier.waiting) {
    t->barrier_sum = barrier.sum;
    wake(t);
  }
  barrier.waiting.clear();
  barrier.arrived = barrier.sum = 0;
  state.visits = 0;
}

// Every thread of a barrier arrives from one place, or it is not the same barrier.
void arrive(Barrier& barrier, const char* name, int expected, int value, bool waits, bool one_site, Site site) {
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.site = site;
    barrier.expected = expected;
  } else if (barrier.name != name || (one_site && !(barrier.site == site))) {
    fail("divergent barrier: it is at " + text(name, site) + " while " + std::to_string(barrier.arrived) +
         " threads wait at " + text(barrier.name, barrier.site));
  } else if (barrier.expected != expected) {
    fail(text(name, site) + " counts " + std::to_string(expected) + " threads, but others counted " +
         std::to_string(barrier.expected));
  }
  barrier.sum += value;
  Thread* self = state.current;
  if (waits) barrier.waiting.push_back(self);
  if (++barrier.arrived == expected) {
    release(barrier);
    if (waits) run_next(self->context, false);
  } else if (waits) {
    wait_in(name, site);
  }
}

int threads_per_block() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

int whole_barrier(const char* name, Site site) {
  for (const Block& block : state.blocks) {
    if (block.n_gone > 0) fail(text(name, site) + ", but threads of block " + text(block.position) + " have exited");
  }
  const int expected = threads_per_block() * static_cast<int>(state.blocks.size());
  arrive(state.whole, name, expected, 0, true, true, site);
  return state.current->barrier_sum;
}

// --- threads and blocks

void note_exit(Thread& self) {
  Block& block = *self.block;
  Warp& warp = block.warps[self.index / kWarp];
  const uint32_t bit = 1u << self.index % kWarp;
  ++block.n_gone;
  warp.gone |= bit;
  --state.n_alive;
  state.visits = 0;
  for (const Barrier* barrier : {&block.barriers[0], &state.whole}) {
    if (barrier->arrived > 0) {
      fail("it exits while " + std::to_string(barrier->arrived) + " threads wait at " +
           text(barrier->name, barrier->site));
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((warp.waiting >> lane & 1) && (warp.mask[lane] & bit)) {
      fail("it exits while lane " + std::to_string(lane) + " of its warp waits for it at " +
           text(warp.lanes[lane]->doing, warp.lanes[lane]->site));
    }
  }
}

void thread_main() {
  Context::entered(*state.host);
  Thread& self = *state.current;
  try {
    (*state.body)();
  } catch (const std::exception& error) {
    fail(error.what());
  }
  note_exit(self);
  run_next(self.context, true);
}

void poison(Chunk& chunk) { std::memset(chunk.data, 0xff, chunk.size); }

void* shared_chunk(Block& block, const void* key, size_t size, size_t alignment) {
  for (const Chunk& c : block.shared) {
    if (c.key == key) return c.data;
  }
  auto* data = static_cast<char*>(::operator new(size, std::align_val_t{alignment}));
  block.shared.push_back({key, data, size, alignment});
  poison(block.shared.back());
  return data;
}

uint3 position_of(uint64_t index, const unsigned (&size)[3]) {
  return {static_cast<unsigned>(index % size[0]), static_cast<unsigned>(index / size[0] % size[1]),
          static_cast<unsigned>(index / size[0] / size[1])};
}

void start_block(Block& block, size_t first_thread) {
  const int n_threads = threads_per_block();
  block.warps.resize((n_threads + kWarp - 1) / kWarp);
  if (state.shape.shared_bytes > 0) shared_chunk(block, nullptr, state.shape.shared_bytes, 1024);
  for (int i = 0; i < n_threads; ++i) {
    const size_t slot = first_thread + i;
    if (slot == state.threads.size()) state.threads.push_back(std::make_unique<Thread>());
    Thread& t = *state.threads[slot];
    t.block = &block;
    t.position = position_of(i, state.shape.block);
    t.index = i;
    t.doing = nullptr;
    t.copies.clear();
    t.copy_group = 0;
    t.context.start(thread_main, state.stacks.stack(slot), StackPool::usable(slot));
    Warp& warp = block.warps[i / kWarp];
    warp.lanes[i % kWarp] = &t;
    warp.gone &= ~(1u << i % kWarp);
    state.runnable.push_back(&t);
  }
}

std::string describe_deadlock() {
  std::string message = "deadlock: no thread can run";
  for (const Block& block : state.blocks) {
    std::map<std::string, int> waits;
    for (const Warp& warp : block.warps) {
      for (int lane = 0; lane < kWarp; ++lane) {
        if (!(warp.gone >> lane & 1)) ++waits[text(warp.lanes[lane]->doing, warp.lanes[lane]->site)];
      }
    }
    if (waits.empty()) continue;
    message += "; block " + text(block.position) + ":";
    for (const auto& [where, n] : waits) message += " " + std::to_string(n) + " wait at " + where + ",";
    message += " " + std::to_string(block.n_gone) + " exited";
  }
  return message;
}

// Runs blocks [first, first + n) of the grid together.
void run_blocks(uint64_t first, size_t n) {
  state.blocks.clear();
  state.blocks.resize(n);
  state.runnable.clear();
  state.whole = Barrier{};
  state.visits = 0;
  state.n_alive = n * threads_per_block();
  for (size_t i = 0; i < n; ++i) {
    state.blocks[i].position = position_of(first + i, state.shape.grid);
    state.blocks[i].rank = static_cast<int>((first + i) % state.shape.cluster);
    start_block(state.blocks[i], i * threads_per_block());
  }
  Context& host = *state.host;
  state.current = nullptr;
  run_next(host, false);
  if (state.error.empty() && state.n_alive > 0) state.error = describe_deadlock();
}

}  // namespace

void fail(const std::string& message) {
  state.error = text(*state.current) + ": " + message;
  state.host->resume(state.current->context, true);
  std::abort();
}

void scheduling_point() {
  Thread* self = state.current;
  if (++state.visits > kHopeless) fail("livelock: threads spin, and none passes a barrier or ends");
  if (next_random() % 8 != 0) return;
  state.runnable.push_back(self);
  run_next(self->context, false);
}

int block_barrier(const char* name, int value, Site site) {
  Block& block = *state.current->block;
  if (block.n_gone > 0) {
    fail(text(name, site) + ", but " + std::to_string(block.n_gone) + " threads of the block have exited");
  }
  arrive(block.barriers[0], name, threads_per_block(), value, true, true, site);
  return state.current->barrier_sum;
}

int cluster_barrier(Site site) { return whole_barrier("cluster_sync", site); }

int grid_barrier(Site site) {
  if (!state.shape.cooperative) fail("a grid barrier needs a cooperative launch");
  return whole_barrier("grid sync", site);
}

void named_barrier(int id, int n_threads, bool waits, Site site) {
  if (id < 1 || id >= kNamedBarriers) fail("a named barrier's id must be 1 to 15, got " + std::to_string(id));
  if (n_threads <= 0 || n_threads % kWarp || n_threads > threads_per_block()) {
    fail("a named barrier counts whole warps of the block, got " + std::to_string(n_threads) + " threads");
  }
  arrive(state.current->block->barriers[id], "named barrier", n_threads, 0, waits, false, site);
}

void warp_collective(const char* name, uint32_t mask, void* data, Complete complete, Site site) {
  Thread& self = *state.current;
  Warp& warp = self.block->warps[self.index / kWarp];
  const int lane = self.index % kWarp;
  if (!(mask >> lane & 1)) fail(text(name, site) + " with a mask that lacks the lane itself");
  if (mask & warp.gone) fail(text(name, site) + " names lanes that do not exist or have exited");
  bool all_here = true;
  for (int k = 0; k < kWarp; ++k) {
    if (k == lane || !(mask >> k & 1)) continue;
    const bool waits = warp.waiting >> k & 1;
    all_here &= waits && warp.mask[k] == mask;
    if (!waits || !(warp.mask[k] >> lane & 1)) continue;  // it still has to come here
    const Thread& other = *warp.lanes[k];
    if (warp.mask[k] != mask || warp.complete[k] != complete || !(other.site == site)) {
      fail("divergent warp: lane " + std::to_string(lane) + " is at " + text(name, site) + ", lane " +
           std::to_string(k) + " at " + text(other.doing, other.site) +
           (warp.mask[k] != mask ? " with another mask" : ""));
    }
  }
  warp.data[lane] = data;
  if (!all_here) {
    warp.mask[lane] = mask;
    warp.complete[lane] = complete;
    warp.waiting |= 1u << lane;
    wait_in(name, site);
    return;
  }
  complete(warp.data, mask);
  warp.waiting &= ~mask;
  for (int k = 0; k < kWarp; ++k) {
    if (mask >> k & 1) wake(warp.lanes[k]);
  }
  run_next(self.context, false);
}

void* static_shared(const void* key, size_t size, size_t alignment) {
  return shared_chunk(*state.current->block, key, size, std::max<size_t>(alignment, 16));
}

void* dynamic_shared() {
  if (state.shape.shared_bytes == 0) fail("the launch asked for no dynamic shared memory");
  return shared_chunk(*state.current->block, nullptr, 0, 0);
}

int cluster_rank() { return state.current->block->rank; }
int cluster_size() { return static_cast<int>(state.shape.cluster); }

void* shared_of_rank(void* mine, int rank) {
  if (rank < 0 || rank >= cluster_size()) fail("the cluster has no block of rank " + std::to_string(rank));
  if (cluster_size() == 1) return mine;
  Block& self = *state.current->block;
  Block& other = *(&self + (rank - self.rank));
  if (other.n_gone == threads_per_block()) fail("the block of rank " + std::to_string(rank) + " has exited");
  const auto* place = static_cast<const char*>(mine);
  for (const Chunk& c : self.shared) {
    if (place < c.data || place >= c.data + c.size) continue;
    return static_cast<char*>(shared_chunk(other, c.key, c.size, c.alignment)) + (place - c.data);
  }
  fail("not an address in this block's shared memory");
}

namespace {
void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.size - copy.valid);
}
}  // namespace

void copy_async(void* shared, const void* global, size_t size, size_t valid) {
  if (reinterpret_cast<uintptr_t>(shared) % size || reinterpret_cast<uintptr_t>(global) % size) {
    fail("cp.async of " + std::to_string(size) + " bytes needs addresses aligned to that");
  }
  Thread& self = *state.current;
  const Copy copy{shared, global, size, valid, self.copy_group};
  if (next_random() % 2) {
    perform(copy);
  } else {
    self.copies.push_back(copy);
  }
}

void commit_copies() { ++state.current->copy_group; }

void wait_copies(int groups_left) {
  Thread& self = *state.current;
  const int done = self.copy_group - groups_left;
  size_t n = 0;
  for (; n < self.copies.size() && self.copies[n].group < done; ++n) perform(self.copies[n]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + n);
}

bool run(const Shape& shape, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launching);
  static const uint64_t seed = [] {
    const char* value = std::getenv("DIFFULLAMA_SIMULATED_SEED");
    return value ? std::strtoull(value, nullptr, 10) : 0;
  }();
  state.shape = shape;
  state.body = &body;
  state.random = seed * 0xD1342543DE82EF95u + state.n_launches++;
  state.error.clear();
  state.host = std::make_unique<Context>();
  gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
  blockDim = {shape.block[0], shape.block[1], shape.block[2]};
  const uint64_t n_blocks = uint64_t{shape.grid[0]} * shape.grid[1] * shape.grid[2];
  const uint64_t together = shape.cooperative ? n_blocks : shape.cluster;
  std::vector<uint64_t> order(n_blocks / together);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  for (const uint64_t group : order) {
    run_blocks(group * together, together);
    if (!state.error.empty()) break;
  }
  state.blocks.clear();
  return state.error.empty();
}

const std::string& last_error() { return state.error; }

}  // namespace simulator
