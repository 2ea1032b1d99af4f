// SPDX-License-Identifier: Apache-2.0
// unmask on the CPU: sequences in parallel; selection, not a full sort, wherever the rule allows it.
#include <algorithm>
#include <cmath>

#include "../common/philox_lanes.h"
#include "unmasking.h"
#include "unmasking_math.h"

namespace diffullama {
namespace {

struct Entry {
  float confidence;
  int32_t position;
};

// Rank order: falling confidence, equal ones by position.
inline bool ranks_before(const Entry& a, const Entry& b) {
  return a.confidence != b.confidence ? a.confidence > b.confidence : a.position < b.position;
}

struct Sequence {
  const bool* masked;        // [L]
  const int64_t* token;      // [L]
  const float* confidence;   // [L]
  int64_t L;
  float amount;
  uint64_t sample_index;
};

bool eligible(const Sequence& s, int64_t i) { return s.masked[i] && s.token[i] >= 0 && s.confidence[i] == s.confidence[i]; }

void eligible_entries(const Sequence& s, std::vector<Entry>& entries) {
  entries.clear();
  for (int64_t i = 0; i < s.L; ++i) {
    if (eligible(s, i)) entries.push_back({s.confidence[i], static_cast<int32_t>(i)});
  }
}

// Each of these moves the committed entries to the front and returns how many they are; entries is not empty.
size_t choose_quota(std::vector<Entry>& entries, float amount) {
  const float wanted = std::max(1.0f, std::ceil(amount));  // rank < amount; NaN gives 1
  if (wanted >= static_cast<float>(entries.size())) return entries.size();
  const auto k = static_cast<size_t>(wanted);
  std::nth_element(entries.begin(), entries.begin() + k, entries.end(), ranks_before);
  return k;
}

size_t choose_threshold(std::vector<Entry>& entries, float amount) {
  std::iter_swap(entries.begin(), std::min_element(entries.begin(), entries.end(), ranks_before));
  const auto end =
      std::partition(entries.begin() + 1, entries.end(), [amount](const Entry& e) { return e.confidence >= amount; });
  return static_cast<size_t>(end - entries.begin());
}

size_t choose_factor(std::vector<Entry>& entries, float amount) {
  std::sort(entries.begin(), entries.end(), ranks_before);
  size_t n = 1;
  while (n < entries.size() && passes_factor(entries[n].confidence, amount, static_cast<int64_t>(n))) ++n;
  return passes_factor(entries[0].confidence, amount, 0) ? n : 1;
}

DIFFULLAMA_VECTORIZED void random_words(int64_t L, uint64_t seed, uint32_t step, uint64_t sample_index, uint32_t* words) {
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

// words holds L entries rounded up to whole philox_lanes calls.
size_t choose_random(std::vector<Entry>& entries, float amount, const std::vector<uint32_t>& words) {
  const uint64_t threshold = threshold32(amount);
  const auto end = std::stable_partition(entries.begin(), entries.end(),
                                         [&](const Entry& e) { return words[e.position] < threshold; });
  if (end != entries.begin()) return static_cast<size_t>(end - entries.begin());
  const auto smallest = std::min_element(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    return words[a.position] != words[b.position] ? words[a.position] < words[b.position] : a.position < b.position;
  });
  std::iter_swap(entries.begin(), smallest);
  return 1;
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
  Tensor xt_out = torch::stable::clone(xt_c), committed = zeros_like_device(xt, {B, L}, ScalarType::Bool);
  Tensor remaining = empty_like_device(xt, {B}, ScalarType::Long);
  const bool* masked_data = masked_c.const_data_ptr<bool>();
  const int64_t *token_data = token_c.const_data_ptr<int64_t>(), *index = index_c.const_data_ptr<int64_t>();
  const float *confidence_data = confidence_c.const_data_ptr<float>(), *amount_data = amount_c.const_data_ptr<float>();
  int64_t *xt_data = xt_out.mutable_data_ptr<int64_t>(), *remaining_data = remaining.mutable_data_ptr<int64_t>();
  bool* committed_data = committed.mutable_data_ptr<bool>();
  const uint64_t key = static_cast<uint64_t>(scalar_of("seed", seed));
  const uint32_t stream = static_cast<uint32_t>(scalar_of("step", step));

  torch::stable::parallel_for(0, B, std::max<int64_t>(1, 4096 / std::max<int64_t>(L, 1)), [&](int64_t begin, int64_t end) {
    std::vector<Entry> entries;
    entries.reserve(L);
    std::vector<uint32_t> words(rule == Rule::kRandom ? L + 4 * kPhiloxLanes : 0);
    for (int64_t b = begin; b < end; ++b) {
      const Sequence s{masked_data + b * L, token_data + b * L, confidence_data + b * L, L, amount_data[b],
                       static_cast<uint64_t>(index[b])};
      eligible_entries(s, entries);
      remaining_data[b] = std::count(s.masked, s.masked + L, true);
      if (entries.empty()) continue;
      if (rule == Rule::kRandom) random_words(L, key, stream, s.sample_index, words.data());
      const size_t n = rule == Rule::kQuota       ? choose_quota(entries, s.amount)
                       : rule == Rule::kThreshold ? choose_threshold(entries, s.amount)
                       : rule == Rule::kFactor    ? choose_factor(entries, s.amount)
                                                  : choose_random(entries, s.amount, words);
      for (size_t i = 0; i < n; ++i) {
        committed_data[b * L + entries[i].position] = true;
        xt_data[b * L + entries[i].position] = s.token[entries[i].position];
      }
      remaining_data[b] -= static_cast<int64_t>(n);
    }
  });
  return {xt_out, committed, remaining};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) { m.impl("unmask", TORCH_BOX(&diffullama::unmask_cpu)); }
