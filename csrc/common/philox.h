// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al., SC 2011): four random words as a pure function of (seed, index / 4, tag, stream).
// diffullama_ext/reference/philox.py is the same function; tests require equality word for word.
#pragma once

#include <cstdint>

#include "macros.h"

namespace diffullama {

// Third counter word: keeps the streams of two ops with the same seed apart. Mirrored in reference/philox.py.
enum class Tag : uint32_t {
  kNoise = 1,
  kAttentionMask = 2,
  kToken = 3,
  kUnmask = 4,
  kTime = 5,
  kReplacement = 6,
  kChoice = 7,
};

struct Words4 {
  uint32_t w[4];
};

// nvcc makes a full 64-bit product of the C++ form: an addition more in each of 20 products.
DIFFULLAMA_HOST_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

// One round over one counter, in place; k0 and k1 are the round's keys.
DIFFULLAMA_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                                         uint32_t k1) {
  const uint64_t p0 = multiply_wide(0xD2511F53u, c0);
  const uint64_t p1 = multiply_wide(0xCD9E8D57u, c2);
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

// index4 is index / 4: lane index % 4 of the result belongs to index.
DIFFULLAMA_HOST_DEVICE Words4 philox(uint64_t seed, uint64_t index4, Tag tag, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(index4), c1 = static_cast<uint32_t>(index4 >> 32);
  uint32_t c2 = static_cast<uint32_t>(tag), c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The word of the sample's position: index = sample_index * 2^34 + position, so the high half of the sample index is
// the stream. Shared by noising (kNoise).
DIFFULLAMA_HOST_DEVICE Words4 philox_of_sample(uint64_t seed, uint64_t sample_index, uint64_t position4, Tag tag) {
  return philox(seed, (sample_index << 32) | position4, tag, static_cast<uint32_t>(sample_index >> 32));
}

}  // namespace diffullama
