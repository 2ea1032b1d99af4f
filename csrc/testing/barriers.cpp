// SPDX-License-Identifier: Apache-2.0
// Barriers and warp-wide operations, and what is wrong with who meets there.
#include "state.h"

namespace simulator {
namespace {

void release(Barrier& barrier) {
  for (Thread* t = barrier.waiting; t != nullptr; t = t->next_waiting) {
    t->barrier_sum = barrier.sum;
    make_runnable(*t);
  }
  barrier.waiting = nullptr;
  barrier.arrived = barrier.sum = 0;
  barrier.phase ^= 1;
  state.visits = 0;
  favour_anew();
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
  const char* phase = &barrier.phases[barrier.phase];
  publish(phase);
  if (waits) {
    self->next_waiting = barrier.waiting;
    barrier.waiting = self;
  }
  if (++barrier.arrived == expected) {
    release(barrier);
    if (waits) run_next(self->context, false);
  } else if (waits) {
    wait_in(name, site);
  }
  if (waits) observe(phase);
}

int whole_barrier(const char* name, Site site) {
  for (const Block& block : state.blocks) {
    if (block.n_gone > 0) fail(text(name, site) + ", but threads of block " + text(block.position) + " have exited");
  }
  const int expected = threads_per_block() * static_cast<int>(state.blocks.size());
  arrive(state.whole, name, expected, 0, true, true, site);
  return state.current->barrier_sum;
}

}  // namespace

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

const void* warp_of_thread() { return state.current->warp; }
int lane_of_thread() { return state.current->lane; }

void warp_collective(const char* name, uint32_t mask, void* data, Complete complete, Site site) {
  Thread& self = *state.current;
  Warp& warp = *self.warp;
  const int lane = self.lane;
  if (!(mask >> lane & 1)) fail(text(name, site) + " with a mask that lacks the lane itself");
  if (mask & warp.gone) fail(text(name, site) + " names lanes that do not exist or have exited");
  uint32_t here = 1u << lane;
  for (uint32_t others = mask & warp.waiting; others != 0; others &= others - 1) {
    const int k = __builtin_ctz(others);
    if (!(warp.mask[k] >> lane & 1)) continue;  // it still has to come here
    const Thread& other = *warp.lanes[k];
    if (warp.mask[k] != mask || warp.complete[k] != complete || !(other.site == site)) {
      fail("divergent warp: lane " + std::to_string(lane) + " is at " + text(name, site) + ", lane " +
           std::to_string(k) + " at " + text(other.doing, other.site) +
           (warp.mask[k] != mask ? " with another mask" : ""));
    }
    here |= 1u << k;
  }
  warp.data[lane] = data;
  if (here != mask) {
    warp.mask[lane] = mask;
    warp.complete[lane] = complete;
    warp.waiting |= 1u << lane;
    wait_in(name, site);
    return;
  }
  complete(warp.data, mask);
  warp.waiting &= ~mask;
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) make_runnable(*warp.lanes[__builtin_ctz(lanes)]);
  run_next(self.context, false);
}

}  // namespace simulator
