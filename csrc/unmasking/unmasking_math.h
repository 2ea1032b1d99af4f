// SPDX-License-Identifier: Apache-2.0
// Integer probabilities and the inverse-CDF draw; host and device. Mirrored in reference/unmasking.py.
#pragma once

#include <cmath>
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

enum class Rule { kQuota, kThreshold, kFactor, kRandom };

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

// The confidence of these bits, but for the sign of 0.
DIFFULLAMA_HOST_DEVICE float confidence_of(uint32_t descending_bits) {
  const uint32_t ascending = ~descending_bits, bits = ascending >> 31 ? ascending & 0x7fffffffu : ~ascending;
  float confidence;
  memcpy(&confidence, &bits, sizeof confidence);
  return confidence;
}

// The cut that admits every key of this rank value: positions are below 2^32 - 1, so it stays below kIneligible.
DIFFULLAMA_HOST_DEVICE uint64_t cut_at(uint32_t descending_bits) { return rank_key(descending_bits, 0xfffffffeu); }

// What threshold and random admit whatever the ranks; 0 is nothing.
DIFFULLAMA_HOST_DEVICE uint64_t threshold_cut(float amount) {
  return amount == amount ? cut_at(confidence_bits(amount)) : 0;
}
DIFFULLAMA_HOST_DEVICE uint64_t random_cut(float amount) {
  const uint64_t threshold = threshold32(amount);
  return threshold == 0 ? 0 : cut_at(static_cast<uint32_t>(threshold - 1));
}

// How many of n >= 1 eligible entries a quota commits; NaN is 1.
DIFFULLAMA_HOST_DEVICE int64_t quota_count(float amount, int64_t n) {
  const float wanted = ceilf(amount);
  if (!(wanted > 1.0f)) return 1;
  return wanted >= static_cast<float>(n) ? n : static_cast<int64_t>(wanted);
}

DIFFULLAMA_HOST_DEVICE bool is_eligible(bool masked, int64_t token, float confidence) {
  return masked & (token >= 0) & (confidence == confidence);  // no branch: loops over it vectorise
}

// Fast-dLLM's factor rule for the entry of descending rank 0, 1, ...: c_(n) >= 1 - f / (n + 1), n = rank + 1.
DIFFULLAMA_HOST_DEVICE bool passes_factor(float confidence, float factor, int64_t rank) {
  return confidence >= 1.0f - factor / static_cast<float>(rank + 2);
}

}  // namespace diffullama
