// SPDX-License-Identifier: Apache-2.0
// unmask on the CPU: sequences in parallel. Every rule becomes a cut over unique rank keys; only `factor` sorts.
#include <algorithm>
#include <cmath>
#include <utility>

#include "../common/philox_lanes.h"
#include "unmasking.h"
#include "unmasking_math.h"

namespace diffullama {
namespace {

constexpr size_t kSelectBelow = 64;  // candidates left to std::nth_element
constexpr int kBucketBits = 8;

struct Sequence {
  const int64_t* xt;        // [L]
  const uint8_t* masked;    // [L]
  const int64_t* token;     // [L]
  const float* confidence;  // [L]
  int64_t* xt_out;          // [L]
  uint8_t* committed;       // [L]
  int64_t L;
  float amount;
};

// Scratch of one thread. words holds L entries rounded up to whole philox_lanes calls.
struct Scratch {
  explicit Scratch(int64_t L) : keys(L), candidates(L + 1), words(L + 4 * kPhiloxLanes) {}
  std::vector<uint64_t> keys, candidates;
  std::vector<uint32_t> words;
  size_t n = 0;  // candidates in use: the eligible keys
};

DIFFULLAMA_VECTORIZED void confidence_words(const float* confidence, int64_t L, uint32_t* words) {
  for (int64_t i = 0; i < L; ++i) words[i] = confidence_bits(confidence[i]);
}

DIFFULLAMA_VECTORIZED void random_words(int64_t L, uint64_t seed, uint32_t step, uint64_t sample_index,
                                        uint32_t* words) {
  for (int64_t group = 0; group < (L + 3) / 4; group += kPhiloxLanes) {
    uint32_t c[4][kPhiloxLanes];
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      c[0][lane] = static_cast<uint32_t>(group + lane);
      c[1][lane] = static_cast<uint32_t>(sample_index);
      c[2][lane] = static_cast<uint32_t>(Tag::kUnmask);
      c[3][lane] = step;
    }
    philox_lanes(c, seed);
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      for (int k = 0; k < 4; ++k) words[4 * (group + lane) + k] = c[k][lane];
    }
  }
}

DIFFULLAMA_VECTORIZED void make_keys(const Sequence& s, const uint32_t* __restrict words, uint64_t* __restrict keys) {
  const uint8_t* __restrict masked = s.masked;
  const int64_t* __restrict token = s.token;
  const float* __restrict confidence = s.confidence;
  for (int64_t i = 0, L = s.L; i < L; ++i) {
    const uint64_t key = rank_key(words[i], static_cast<uint32_t>(i));
    keys[i] = is_eligible(masked[i] != 0, token[i], confidence[i]) ? key : kIneligible;
  }
}

// Copies the keys that keep(key) to out, branch-free, in order; out may be keys, and has room for one more than n.
template <class Keep>
size_t compact(const uint64_t* keys, size_t n, uint64_t* out, Keep keep) {
  size_t kept = 0;  // a local: through memory it would cost a store-to-load round trip an entry
  for (size_t i = 0; i < n; ++i) {
    const uint64_t key = keys[i];
    out[kept] = key;
    kept += keep(key);
  }
  return kept;
}

DIFFULLAMA_VECTORIZED std::pair<uint64_t, uint64_t> key_range(const uint64_t* keys, size_t n) {
  uint64_t low = kIneligible, high = 0;
  for (size_t i = 0; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  return {low, high};
}

uint64_t smallest(const Scratch& s) { return key_range(s.candidates.data(), s.n).first; }

// The k-th smallest candidate, k from 1: descend into the bucket, of 2^kBucketBits over the candidates' range, that
// holds it.
uint64_t kth_smallest(Scratch& s, size_t k) {
  uint64_t* const keys = s.candidates.data();
  while (s.n > kSelectBelow) {
    const auto [low, high] = key_range(keys, s.n);
    const uint64_t base = low, span = high - low;
    const int shift = std::max(0, 64 - __builtin_clzll(span) - kBucketBits);  // keys are unique: span > 0
    size_t counts[1 << kBucketBits] = {};
    for (size_t i = 0, n = s.n; i < n; ++i) ++counts[(keys[i] - base) >> shift];
    uint64_t bucket = 0;
    while (k > counts[bucket]) k -= counts[bucket++];
    s.n = compact(keys, s.n, keys, [=](uint64_t key) { return (key - base) >> shift == bucket; });
  }
  std::nth_element(keys, keys + (k - 1), keys + s.n);
  return keys[k - 1];
}

uint64_t quota_cut(Scratch& s, float amount) {
  const auto wanted = static_cast<size_t>(quota_count(amount, static_cast<int64_t>(s.n)));
  return wanted == s.n ? kIneligible - 1 : kth_smallest(s, wanted);
}

uint64_t factor_cut(Scratch& s, const float* confidence, float amount) {
  std::sort(s.candidates.begin(), s.candidates.begin() + s.n);
  size_t n = 0;
  while (n < s.n && passes_factor(confidence[static_cast<uint32_t>(s.candidates[n])], amount, static_cast<int64_t>(n)))
    ++n;
  return s.candidates[std::max<size_t>(n, 1) - 1];
}

// Writes xt_out and committed; returns how many entries of masked stay masked.
DIFFULLAMA_VECTORIZED int64_t commit(const Sequence& s, const uint64_t* __restrict keys, uint64_t cut) {
  const uint8_t* __restrict masked = s.masked;
  const int64_t* __restrict token = s.token, * __restrict xt = s.xt;
  int64_t* __restrict xt_out = s.xt_out;
  uint8_t* __restrict committed = s.committed;
  int64_t remaining = 0;
  for (int64_t i = 0, L = s.L; i < L; ++i) {
    const uint8_t hit = keys[i] <= cut;  // an ineligible key is above every cut
    committed[i] = hit;
    const int64_t kept = xt[i], written = token[i];
    xt_out[i] = hit ? written : kept;
    remaining += masked[i] & (hit ^ 1);
  }
  return remaining;
}

int64_t unmask_sequence(const Sequence& s, Rule rule, uint64_t seed, uint32_t step, uint64_t sample_index,
                        Scratch& scratch) {
  if (rule == Rule::kRandom) {
    random_words(s.L, seed, step, sample_index, scratch.words.data());
  } else {
    confidence_words(s.confidence, s.L, scratch.words.data());
  }
  make_keys(s, scratch.words.data(), scratch.keys.data());
  scratch.n = compact(scratch.keys.data(), scratch.keys.size(), scratch.candidates.data(),
                      [](uint64_t key) { return key != kIneligible; });
  uint64_t cut = 0;  // below every ineligible key
  if (scratch.n > 0) {
    const float amount = s.amount;  // at least the first-ranked is admitted
    cut = rule == Rule::kQuota       ? quota_cut(scratch, amount)
          : rule == Rule::kThreshold ? std::max(smallest(scratch), threshold_cut(amount))
          : rule == Rule::kFactor    ? factor_cut(scratch, s.confidence, amount)
                                     : std::max(smallest(scratch), random_cut(amount));
  }
  return commit(s, scratch.keys.data(), cut);
}

std::tuple<Tensor, Tensor, Tensor> unmask_cpu(const Tensor& xt, const Tensor& masked, const Tensor& token,
                                              const Tensor& confidence, const Tensor& amount, const Tensor& seed,
                                              const Tensor& step, const Tensor& sample_index, std::string rule_name) {
  check_unmask(xt, masked, token, confidence, amount, seed, step, sample_index);
  const Rule rule = parse_rule(rule_name);
  const int64_t B = xt.size(0), L = xt.size(1);
  const Tensor xt_c = as_contiguous(xt), masked_c = as_contiguous(masked);
  const Tensor token_c = as_contiguous(token), confidence_c = as_contiguous(confidence);
  const Tensor amount_c = as_contiguous(amount), index_c = as_contiguous(sample_index);
  Tensor xt_out = empty_like_device(xt, {B, L}, ScalarType::Long),
         committed = empty_like_device(xt, {B, L}, ScalarType::Bool);
  Tensor remaining = empty_like_device(xt, {B}, ScalarType::Long);
  const int64_t* xt_in = xt_c.const_data_ptr<int64_t>();
  const uint8_t* masked_data = const_bytes(masked_c);
  const int64_t *token_data = token_c.const_data_ptr<int64_t>(), *index = index_c.const_data_ptr<int64_t>();
  const float *confidence_data = confidence_c.const_data_ptr<float>(), *amount_data = amount_c.const_data_ptr<float>();
  int64_t *xt_data = xt_out.mutable_data_ptr<int64_t>(), *remaining_data = remaining.mutable_data_ptr<int64_t>();
  uint8_t* committed_data = mutable_bytes(committed);
  const uint64_t key = static_cast<uint64_t>(scalar_of("seed", seed));
  const uint32_t stream = static_cast<uint32_t>(scalar_of("step", step));

  torch::stable::parallel_for(
      0, B, std::max<int64_t>(1, 4096 / std::max<int64_t>(L, 1)), [&](int64_t begin, int64_t end) {
        Scratch scratch(L);
        for (int64_t b = begin; b < end; ++b) {
          const int64_t row = b * L;
          const Sequence s{xt_in + row,
                           masked_data + row,
                           token_data + row,
                           confidence_data + row,
                           xt_data + row,
                           committed_data + row,
                           L,
                           amount_data[b]};
          remaining_data[b] = unmask_sequence(s, rule, key, stream, static_cast<uint64_t>(index[b]), scratch);
        }
      });
  return {xt_out, committed, remaining};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) { m.impl("unmask", TORCH_BOX(&diffullama::unmask_cpu)); }
