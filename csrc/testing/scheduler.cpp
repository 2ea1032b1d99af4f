// SPDX-License-Identifier: Apache-2.0
// Launches: starting the threads of blocks, choosing who runs, noticing that nobody can.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>

#include "cuda/cuda_runtime.h"
#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simulator {

State state;

uint64_t next_random() {  // splitmix64
  uint64_t z = state.random += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

size_t random_below(size_t n) { return static_cast<size_t>((static_cast<unsigned __int128>(next_random()) * n) >> 64); }

int threads_per_block() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(const char* name, Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(name) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

std::string text(const Thread& t) { return "block " + text(t.block->position) + " thread " + text(t.position); }

// --- who runs

void favour_anew() { state.favour = static_cast<Favour>(random_below(3)); }

void make_runnable(Thread& thread) {
  Warp& warp = *thread.warp;
  thread.doing = nullptr;
  if (warp.runnable == 0) {
    warp.place = state.active.size();
    state.active.push_back(&warp);
  }
  warp.runnable |= 1u << thread.lane;
}

namespace {

Warp& choose_warp() {
  if (random_below(256) == 0) favour_anew();
  if (state.current != nullptr && state.favour == Favour::kWarp && state.current->warp->runnable != 0) {
    return *state.current->warp;
  }
  Warp* warp = state.active[random_below(state.active.size())];
  for (int tries = 0; state.current != nullptr && state.favour == Favour::kBlock && tries < 8; ++tries) {
    if (warp->block == state.current->block) break;
    warp = state.active[random_below(state.active.size())];
  }
  return *warp;
}

// Takes a runnable thread out; null if there is none.
Thread* take_runnable() {
  if (state.active.empty()) return nullptr;
  Warp& warp = choose_warp();
  const auto start = static_cast<int>(random_below(kWarp));
  const uint32_t rotated = warp.runnable >> start | warp.runnable << (-start & 31);
  const int lane = (start + __builtin_ctz(rotated)) % kWarp;
  warp.runnable &= ~(1u << lane);
  if (warp.runnable == 0) {
    state.active.back()->place = warp.place;
    std::swap(state.active[warp.place], state.active.back());
    state.active.pop_back();
  }
  return warp.lanes[lane];
}

}  // namespace

// Visits of scheduling points without a barrier passed or a thread ended: after so many, some thread may spin on what
// needs a late copy; after so many more, spinning is called hopeless.
constexpr uint64_t kSpinning = 20'000, kHopeless = 20'000'000;

void run_next(Context& from, bool from_ends) {
  const bool spinning = state.visits > kSpinning;
  if (spinning || (!state.copies.empty() && random_below(64) == 0)) perform_a_copy(spinning);
  Thread* next = take_runnable();
  while (next == nullptr && state.n_alive > 0 && perform_a_copy(true)) next = take_runnable();
  if (next == nullptr) {
    state.host->resume(from, from_ends);
    return;
  }
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

void fail(const std::string& message) {
  state.error = text(*state.current) + ": " + message;
  state.host->resume(state.current->context, true);
  std::abort();
}

void scheduling_point() {
  Thread* self = state.current;
  if (++state.visits > kHopeless) fail("livelock: threads spin, and none passes a barrier or ends");
  if (next_random() % 8 != 0) return;
  make_runnable(*self);
  run_next(self->context, false);
}

// --- threads and blocks

namespace {

void note_exit(Thread& self) {
  Block& block = *self.block;
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  if (self.n_wgmma > self.n_wgmma_waited) fail("it exits while its wgmma is under way");
  ++block.n_gone;
  warp.gone |= bit;
  --state.n_alive;
  state.visits = 0;
  if (block.n_gone == threads_per_block() && state.shape.cluster > 1) {  // others must have read it by now
    for (const Chunk& c : block.shared) std::memset(c.data, 0xff, c.size);
  }
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
  observe(&state.body);  // what the host did
  std::string error;
  try {
    (*state.body)();
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  if (!error.empty()) fail(error);
  note_exit(self);
  publish(&state.n_alive);
  run_next(self.context, true);
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
    Warp& warp = block.warps[i / kWarp];
    warp.block = t.block = &block;
    t.warp = &warp;
    t.lane = i % kWarp;
    t.position = position_of(i, state.shape.block);
    t.copies.clear();
    t.copy_group = 0;
    t.n_wgmma = t.n_wgmma_waited = 0;
    t.wgmma_groups.clear();
    t.wgmma_fenced = false;
    t.context.start(thread_main, state.stacks.stack(slot), StackPool::usable(slot));
    warp.lanes[t.lane] = &t;
    warp.gone &= ~(1u << t.lane);
    make_runnable(t);
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
  state.active.clear();
  state.copies.clear();
  state.late_copies.clear();
  state.active.reserve(n * (threads_per_block() / kWarp + 1));
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
  if (state.error.empty() && !(state.copies.empty() && state.late_copies.empty()))
    state.error = "a block ends while TMA loads are under way";
}

// Neighbours of an ordinary grid that run at the same time, asked anew for each launch.
uint64_t blocks_together() {
  const char* value = std::getenv("DIFFULLAMA_SIMULATED_BLOCKS");
  return std::max<uint64_t>(value ? std::strtoull(value, nullptr, 10) : 1, 1);
}

std::mutex launching;

}  // namespace

bool run(const Shape& shape, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launching);
  static const uint64_t seed = [] {
    const char* value = std::getenv("DIFFULLAMA_SIMULATED_SEED");
    return value ? std::strtoull(value, nullptr, 10) : 0;
  }();
  state.shape = shape;
  state.body = &body;
  state.favour = Favour::kNone;
  state.random = seed * 0xD1342543DE82EF95u + state.n_launches++;
  state.error.clear();
  state.host = std::make_unique<Context>();
  gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
  blockDim = {shape.block[0], shape.block[1], shape.block[2]};
  publish(&state.body);
  const uint64_t n_blocks = uint64_t{shape.grid[0]} * shape.grid[1] * shape.grid[2];
  const uint64_t together = shape.cooperative ? n_blocks : shape.cluster > 1 ? shape.cluster : blocks_together();
  std::vector<uint64_t> order((n_blocks + together - 1) / together);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  for (const uint64_t group : order) {
    run_blocks(group * together, std::min(together, n_blocks - group * together));
    if (!state.error.empty()) break;
  }
  state.blocks.clear();
  if (!state.error.empty()) {  // suspended for good
    for (const auto& thread : state.threads) thread->context.publish_at(&state.n_alive);
    state.threads.clear();
  }
  observe(&state.n_alive);
  return state.error.empty();
}

const std::string& last_error() { return state.error; }

}  // namespace simulator
