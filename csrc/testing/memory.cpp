// SPDX-License-Identifier: Apache-2.0
// Shared memory of blocks and clusters, and asynchronous copies into it.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace simulator {

void* shared_chunk(Block& block, const void* key, size_t size, size_t alignment) {
  for (const Chunk& c : block.shared) {
    if (c.key == key) return c.data;
  }
  size_t total = size;
  for (const Chunk& c : block.shared) total += c.size;
  if (total > kSharedBytesPerBlock) fail("the block's shared memory exceeds " + std::to_string(kSharedBytesPerBlock));
  const NoRaces scope;
  auto* data = static_cast<char*>(::operator new(size, std::align_val_t{alignment}));
  block.shared.push_back({key, data, size, alignment});
  std::memset(data, 0xff, size);
  return data;
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

}  // namespace simulator
