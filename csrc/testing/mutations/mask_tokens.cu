// SPDX-License-Identifier: Apache-2.0
// mask_tokens_kernel against a loop on the host, without torch: tests break the kernel and look whether it still
// agrees. Prints "agrees", "differs" or the launch's error.
#include <cstdio>
#include <vector>

#include "../../noising/noising_kernel.h"
#include "../../noising/noising_math.h"

namespace diffullama {
namespace {

constexpr int64_t kB = 7, kL = 1001, kMaskId = 5, kSeed = 3;

// All vectors end where their data does: AddressSanitizer sees one element more.
struct Data {
  std::vector<int64_t> x0, seed{kSeed}, sample_index, xt, positions, counts, block_counts;
  std::vector<float> p_mask;
  std::vector<char> masked;

  Data()
      : x0(kB * kL),
        sample_index(kB),
        xt(kB * kL, -5),
        positions(kB * kL, -5),
        counts(kB, -5),
        block_counts(kMaskTokensMaxBlocks, int64_t{1} << 40),
        p_mask(kB),
        masked(kB * kL) {
    for (int64_t i = 0; i < kB * kL; ++i) x0[i] = i % 50;
    for (int64_t b = 0; b < kB; ++b) {
      sample_index[b] = b + (b << 32);
      p_mask[b] = 0.05f + 0.13f * static_cast<float>(b);
    }
  }
};

Data expected() {
  Data d;
  size_t n = 0;
  for (int64_t b = 0; b < kB; ++b) {
    d.counts[b] = 0;
    for (int64_t i = b * kL; i < (b + 1) * kL; ++i) {
      const int64_t position = i - b * kL;
      const Words4 words = philox_of_sample(kSeed, d.sample_index[b], position / 4, Tag::kNoise);
      const bool hit = is_masked(words.w[position % 4], threshold32(d.p_mask[b]), true);
      d.masked[i] = hit;
      d.xt[i] = hit ? kMaskId : d.x0[i];
      d.counts[b] += hit;
      if (hit) d.positions[n++] = i;
    }
  }
  for (; n < d.positions.size(); ++n) d.positions[n] = -1;
  return d;
}

cudaError_t run(Data& d) {
  MaskTokensParams p{};
  p.x0 = d.x0.data();
  p.p_mask = d.p_mask.data();
  p.seed = d.seed.data();
  p.sample_index = d.sample_index.data();
  p.xt = d.xt.data();
  p.masked = reinterpret_cast<bool*>(d.masked.data());
  p.positions = d.positions.data();
  p.counts = d.counts.data();
  p.block_counts = d.block_counts.data();
  p.B = kB;
  p.L = kL;
  p.mask_id = kMaskId;
  return launch_mask_tokens(p, nullptr);
}

}  // namespace
}  // namespace diffullama

int main() {
  using namespace diffullama;
  const Data want = expected();
  for (int launches = 0; launches < 4; ++launches) {
    Data got;
    const cudaError_t error = run(got);
    if (error != cudaSuccess) {
      std::puts(cudaGetErrorString(error));
      return 1;
    }
    if (got.xt != want.xt || got.masked != want.masked || got.positions != want.positions ||
        got.counts != want.counts) {
      std::puts("differs");
      return 1;
    }
  }
  std::puts("agrees");
  return 0;
}
