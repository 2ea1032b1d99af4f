// SPDX-License-Identifier: Apache-2.0
// Integer probabilities and the inverse-CDF draw; host and device. Mirrored in reference/unmasking.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/bernoulli.h"
#include "../common/philox.h"

namespace diffullama {

// mass = round(exp((logit - max) / temperature) * 2^kMassBits): sums are exact and order-free, and 2^18 tokens of full
// mass still fit 62 bits.
constexpr int kMassBits = 44;

// The 62-bit uniform of a row.
DIFFULLAMA_HOST_DEVICE uint64_t row_uniform62(uint64_t seed, uint64_t row_index, uint32_t step) {
  const Words4 words = philox(seed, row_index, Tag::kToken, step);
  return (static_cast<uint64_t>(words.w[0]) << 30) | (words.w[1] >> 2);
}

// floor(u * total / 2^62): the token drawn is the first whose inclusive cumulative mass exceeds it.
DIFFULLAMA_HOST_DEVICE uint64_t draw_target(uint64_t uniform62, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(uniform62 << 2, total);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(uniform62) * total) >> 62);
#endif
}

// The nucleus keeps an entry while the mass ranked before it is below top_p of the total.
DIFFULLAMA_HOST_DEVICE bool in_nucleus(uint64_t mass_before, uint64_t total, double top_p) {
  return static_cast<double>(mass_before) < top_p * static_cast<double>(total);
}

// Every rule of unmask is "commit the eligible entries whose key is at most a cut": keys are unique, and rank like
// falling confidence (or rising random word), equal ones by position.
constexpr uint64_t kIneligible = ~uint64_t{0};

DIFFULLAMA_HOST_DEVICE uint64_t rank_key(uint32_t descending_bits, uint32_t position) {
  return (static_cast<uint64_t>(descending_bits) << 32) | position;
}

// Smaller for larger confidence; -0 and 0 alike. The argument is not NaN.
DIFFULLAMA_HOST_DEVICE uint32_t confidence_bits(float confidence) {
  const float canonical = confidence + 0.0f;
  uint32_t bits;
  memcpy(&bits, &canonical, sizeof bits);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return ~ascending;
}

// The cut that admits every key of this rank value: positions are below 2^32 - 1, so it stays below kIneligible.
DIFFULLAMA_HOST_DEVICE uint64_t cut_at(uint32_t descending_bits) { return rank_key(descending_bits, 0xfffffffeu); }

DIFFULLAMA_HOST_DEVICE bool is_eligible(bool masked, int64_t token, float confidence) {
  return masked & (token >= 0) & (confidence == confidence);  // no branch: loops over it vectorise
}

// Fast-dLLM's factor rule for the entry of descending rank 0, 1, ...: c_(n) >= 1 - f / (n + 1), n = rank + 1.
DIFFULLAMA_HOST_DEVICE bool passes_factor(float confidence, float factor, int64_t rank) {
  return confidence >= 1.0f - factor / static_cast<float>(rank + 2);
}

}  // namespace diffullama
