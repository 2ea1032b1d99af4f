// SPDX-License-Identifier: Apache-2.0
// mbarriers and copies of a block, products of its warpgroups.
#include "hopper.h"

#include <algorithm>

#include <cstring>

#include "cuda/half_formats.h"
#include "state.h"

namespace simulator {
namespace {

constexpr int kWarpgroup = 128;

const Chunk* dynamic_chunk(const Block& block) {
  for (const Chunk& c : block.shared) {
    if (c.key == nullptr) return &c;
  }
  return nullptr;
}

uint32_t dynamic_base() { return 1024 + 128 * static_cast<uint32_t>(state.n_launches % 8); }

// The 16 bytes at a shared address.
char* shared_chunk16(const Block& block, uint32_t address, const char* what) {
  const Chunk* chunk = dynamic_chunk(block);
  const uint32_t offset = address - dynamic_base();
  if (chunk == nullptr || address < dynamic_base() || offset + 16 > chunk->size) {
    fail(std::string(what) + " touches shared memory outside the block's dynamic part");
  }
  return chunk->data + offset;
}

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

// --- mbarriers

Mbarrier& initialised(Block& block, const void* barrier) {
  const auto found = block.mbarriers.find(barrier);
  if (found == block.mbarriers.end()) fail("an mbarrier that nobody has initialised");
  return found->second;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.left > 0 || barrier.bytes != 0) return;
  barrier.left = barrier.arrivals;
  barrier.parity ^= 1;
  for (Thread* t = barrier.waiting; t != nullptr; t = t->next_waiting) make_runnable(*t);
  barrier.waiting = nullptr;
  state.visits = 0;
}

// --- copies

void copy_box(const BoxCopy& copy) {
  const CUtensorMap& map = copy.map;
  const uint32_t row_bytes = 2 * map.box[0];
  uint32_t rows = 1;
  for (uint32_t d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (uint32_t row = 0; row < rows; ++row) {
    bool inside = true;
    int64_t offset = 0;
    for (uint32_t d = 1, rest = row; d < map.rank; rest /= map.box[d], ++d) {
      const int64_t at = copy.at.first[d] + static_cast<int64_t>(rest % map.box[d]);
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.size[d]);
      offset += at * static_cast<int64_t>(map.stride[d]);
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += 2) {
      const int64_t at = copy.at.first[0] + static_cast<int64_t>(byte / 2);
      uint16_t element = 0;
      if (inside && at >= 0 && at < static_cast<int64_t>(map.size[0])) {
        std::memcpy(&element, map.data + offset + 2 * at, 2);
      }
      const uint32_t linear = copy.to + row * row_bytes + byte, address = map.swizzled ? swizzled(linear) : linear;
      std::memcpy(shared_chunk16(*copy.block, address & ~15u, "a TMA load") + address % 16, &element, 2);
    }
  }
  Mbarrier& barrier = initialised(*copy.block, copy.barrier);
  barrier.bytes -= static_cast<int64_t>(rows) * row_bytes;
  end_phase_if_complete(barrier);
}

// At once, or some time later.
void start_copy(const CUtensorMap& map, void* shared, void* barrier, const BoxPlace& at) {
  const NoRaces scope;
  initialised(*state.current->block, barrier);
  const BoxCopy copy{map, at, shared_address(shared), barrier, state.current->block};
  const auto when = static_cast<BoxCopy::When>(random_below(3));
  if (when == BoxCopy::When::kAtOnce) {
    copy_box(copy);
  } else {
    (when == BoxCopy::When::kSoon ? state.copies : state.late_copies).push_back(copy);
  }
}

// --- products

Warpgroup& warpgroup_of(const Thread& thread) {
  const size_t index = static_cast<size_t>(thread.warp - thread.block->warps.data()) / 4;
  auto& warpgroups = thread.block->warpgroups;
  if (warpgroups.size() <= index) warpgroups.resize(thread.block->warps.size() / 4 + 1);
  return warpgroups[index];
}

int thread_in_warpgroup(const Thread& t) {
  return static_cast<int>(t.warp - t.block->warps.data()) % 4 * kWarp + t.lane;
}

float element(const void* at, bool is_half) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return is_half ? float_of_half(bits) : float_of_bfloat16(bits);
}

// Element (row of 16 bytes units) of an operand by its descriptor. `line` counts elements across the stored rows, `at`
// along them: K-major operands store rows of K, transposed ones rows of M or N.
float shared_element(const Block& block, uint64_t descriptor, int line, int at, bool is_half) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + static_cast<uint32_t>(line / 8) * stride + static_cast<uint32_t>(line % 8) * 128 +
                           static_cast<uint32_t>(at / 64) * leading + static_cast<uint32_t>(at % 64) * 2;
  const uint32_t place = swizzled(address);
  return element(shared_chunk16(block, place & ~15u, "wgmma") + place % 16, is_half);
}

// The 16 rows of one warp.
void multiply(const Block& block, PendingWgmma& op, int warp) {
  const Wgmma& w = op.product;
  float a[16][16];
  static float b[16][256];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      if (w.a_in_registers) {
        const int thread = 32 * warp + row % 8 * 4 + k % 8 / 2, i = row / 8 + k / 8 * 2;
        a[row][k] = element(reinterpret_cast<const char*>(op.a[thread] + i) + k % 2 * 2, w.is_half);
      } else {
        const int line = 16 * warp + row;
        a[row][k] = shared_element(block, w.a, w.a_transposed ? k : line, w.a_transposed ? line : k, w.is_half);
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < w.columns; ++n) {
      const int line = w.b_transposed ? k : n, at = w.b_transposed ? n : k;
      b[k][n] = shared_element(block, w.b, line, at, w.is_half);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[256];
    const auto place = [&](int n) {
      return op.d[32 * warp + row % 8 * 4 + n % 8 / 2] + n / 8 * 4 + row / 8 * 2 + n % 2;
    };
    for (int n = 0; n < w.columns; ++n) sum[n] = w.accumulate ? *place(n) : 0.0f;
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < w.columns; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < w.columns; ++n) *place(n) = sum[n];
  }
}

// A warp's part of the products before `end`, in order; all threads have issued them.
void perform_until(const Block& block, Warpgroup& group, int warp, size_t end) {
  const NoRaces scope;
  for (; group.n_done[warp] < end; ++group.n_done[warp]) {
    multiply(block, group.ops[group.n_done[warp] - group.first], warp);
  }
  while (!group.ops.empty() && *std::min_element(group.n_done, group.n_done + 4) > group.first) {
    group.ops.pop_front();
    ++group.first;
  }
}

struct WaitForProducts {
  static void complete(WaitForProducts* const*, uint32_t) {}
};

}  // namespace

uint32_t shared_address(const void* variable) {
  const Chunk* chunk = dynamic_chunk(*state.current->block);
  const auto* place = static_cast<const char*>(variable);
  if (chunk == nullptr || place < chunk->data || place > chunk->data + chunk->size) {
    fail("only dynamic shared memory has an address");
  }
  return dynamic_base() + static_cast<uint32_t>(place - chunk->data);
}

void mbarrier_init(void* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 || arrivals < 1) fail("mbarrier.init of a misaligned or empty barrier");
  const NoRaces scope;
  Mbarrier& b = state.current->block->mbarriers[barrier] = Mbarrier{};
  b.arrivals = b.left = arrivals;
}

void mbarrier_arrive(void* barrier, int expected_bytes) {
  Mbarrier& b = initialised(*state.current->block, barrier);
  if (b.left == 0) fail("more arrivals at an mbarrier than it counts");
  publish(&b.phases[b.parity]);
  b.bytes += expected_bytes;
  --b.left;
  end_phase_if_complete(b);
  for (int tries = 0; tries < 4; ++tries) scheduling_point();  // who waited may get far before this thread goes on
}

void mbarrier_wait(void* barrier, int parity, Site site) {
  Mbarrier& b = initialised(*state.current->block, barrier);
  while (b.parity == parity) {
    Thread& self = *state.current;
    self.next_waiting = b.waiting;
    b.waiting = &self;
    wait_in("mbarrier", site);
  }
  observe(&b.phases[parity]);
}

void tma_load(void* shared, const CUtensorMap& map, void* barrier, const BoxPlace& at) {
  if (shared_address(shared) % 128) fail("a TMA load needs a shared address that is a multiple of 128");
  start_copy(map, shared, barrier, at);
}

void bulk_load(void* shared, const void* global, int bytes, void* barrier) {
  if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16 || shared_address(shared) % 16) {
    fail("a bulk copy takes a multiple of 16 bytes at addresses aligned to 16");
  }
  CUtensorMap map{static_cast<const char*>(global), 1, {}, {2}, {}, false};
  map.size[0] = static_cast<uint64_t>(bytes / 2);
  map.box[0] = static_cast<uint32_t>(bytes / 2);
  start_copy(map, shared, barrier, {});
}

bool perform_a_copy(bool late) {
  const NoRaces scope;
  auto& copies = state.copies.empty() && late ? state.late_copies : state.copies;
  if (copies.empty()) return false;
  std::swap(copies[random_below(copies.size())], copies.back());
  const BoxCopy copy = copies.back();
  copies.pop_back();
  copy_box(copy);
  return true;
}

void wgmma_fence() { state.current->wgmma_fenced = true; }

void wgmma(const Wgmma& product, float* d, const uint32_t* a, Site site) {
  const NoRaces scope;
  Thread& self = *state.current;
  if (!self.wgmma_fenced) fail("wgmma without wgmma_fence since the last wgmma_wait");
  const uint64_t swizzle_128 = uint64_t{1} << 62;
  for (const uint64_t descriptor : {product.b, product.a_in_registers ? product.b : product.a}) {
    if ((descriptor & uint64_t{0xffff} << 48) != swizzle_128) fail("wgmma of a layout that is not simulated");
    if (descriptor >> 3 & 7) fail("a matrix of wgmma begins inside the swizzle's pattern of 1024 bytes");
  }
  Warpgroup& group = warpgroup_of(self);
  const size_t index = self.n_wgmma++;
  if (index - group.first == group.ops.size()) group.ops.emplace_back(product, site);
  PendingWgmma& op = group.ops[index - group.first];
  if (!(op.product == product) || !(op.site == site)) {
    fail("divergent warpgroup: it is at " + text("wgmma", site) + ", others at " + text("wgmma", op.site) +
         " or with other operands");
  }
  const int thread = thread_in_warpgroup(self);
  op.d[thread] = d;
  op.a[thread] = a;
  if (++op.n_threads < kWarpgroup) return;
  for (Thread* t = group.waiting; t != nullptr; t = t->next_waiting) make_runnable(*t);
  group.waiting = nullptr;
  if (next_random() % 2) return;
  for (int warp = 0; warp < 4; ++warp) perform_until(*self.block, group, warp, index + 1);
}

void wgmma_commit() {
  const NoRaces scope;
  state.current->wgmma_groups.push_back(state.current->n_wgmma);
}

void wgmma_wait(int groups_left, Site site) {
  Thread& self = *state.current;
  self.wgmma_fenced = false;
  WaitForProducts lane;
  warp_collective("wgmma_wait", ~0u, lane, site);
  const auto n_groups = static_cast<int>(self.wgmma_groups.size());
  if (n_groups <= groups_left) return;
  const size_t end = self.wgmma_groups[n_groups - groups_left - 1];
  self.wgmma_groups.erase(self.wgmma_groups.begin(), self.wgmma_groups.end() - groups_left);
  self.n_wgmma_waited = end;
  Warpgroup& group = warpgroup_of(self);
  while (end > group.first && group.ops[end - 1 - group.first].n_threads < kWarpgroup) {
    self.next_waiting = group.waiting;
    group.waiting = &self;
    wait_in("wgmma", site);
  }
  perform_until(*self.block, group, thread_in_warpgroup(self) / kWarp, end);
}

}  // namespace simulator
