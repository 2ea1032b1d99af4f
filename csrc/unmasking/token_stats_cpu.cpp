// SPDX-License-Identifier: Apache-2.0
// token_stats on the CPU: rows in parallel, each staged once in a thread's scratch. No sort of the vocabulary: the cut
// of top-k and top-p is found by bucketing the entries by value and descending into the bucket where the sum crosses.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "../common/dispatch.h"
#include "../common/row_math.h"
#include "unmasking.h"
#include "unmasking_math.h"

namespace diffullama {
namespace {

constexpr int64_t kTile = 1024;  // entries of one partial sum in the inverse CDF
constexpr int kBuckets = 256;
// Temperatures a float tells from 0 and from infinity; beyond them the draw is greedy, or uniform, anyway.
constexpr double kLowest = std::numeric_limits<float>::min(), kHighest = std::numeric_limits<float>::max();
constexpr int64_t kSortBelow = 64;  // candidates sorted outright

struct Stats {
  int64_t token = -1;
  float values[8];  // prob, sample_prob, p1, p2, gap, entropy, logsumexp, current_prob
};

// x = logits without the forbidden entry; false where a NaN is among them.
template <class T, class Acc>
DIFFULLAMA_VECTORIZED bool load_logits(const T* logits, int64_t V, Acc* x) {
  int32_t nan = 0;
  for (int64_t v = 0; v < V; ++v) {
    x[v] = static_cast<Acc>(logits[v]);
    nan |= x[v] != x[v];
  }
  return nan == 0;
}

// -p log p summed: log(sum e^d) - sum(d e^d) / sum e^d with d = x - max, clamped so that -inf contributes 0.
template <class Acc>
DIFFULLAMA_VECTORIZED double sum_d_exp(const Acc* x, int64_t V, Acc max) {
  return row_sum(x, V, [max](Acc v) {
    const Acc d = v - max < Acc(-104) ? Acc(-104) : v - max;
    return d * exp_nonpositive(d);
  });
}

// round(exp((x - max) / temperature) * 2^44). Adding 1.5 * 2^52 leaves the rounded integer in a double's low bits.
template <class Acc>
DIFFULLAMA_VECTORIZED void masses(const Acc* x, int64_t V, Acc max, Acc temperature, int64_t* mass) {
  constexpr double kUnit = static_cast<double>(int64_t{1} << kMassBits), kRound = 6755399441055744.0;
  for (int64_t v = 0; v < V; ++v) {
    const double rounded = static_cast<double>(exp_nonpositive((x[v] - max) / temperature)) * kUnit + kRound;
    int64_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    mass[v] = bits & ((int64_t{1} << 51) - 1);
  }
}

// Entries ranked by falling x, equal ones by index. Keep those above `value`, and those equal to it up to index `last`.
template <class Acc>
struct Cut {
  Acc value;
  int64_t last;
};

template <class Acc>
DIFFULLAMA_VECTORIZED void apply_cut(const Acc* x, int64_t V, Cut<Acc> cut, int64_t* mass) {
  for (int64_t v = 0; v < V; ++v) {
    const bool keep = x[v] > cut.value || (x[v] == cut.value && v <= cut.last);
    mass[v] = keep ? mass[v] : 0;
  }
}

// The last entry kept when an entry is kept while keep(sum of weight over the entries ranked before it). Entries
// without mass are never drawn, so only those with mass are looked at.
template <class Acc, class Weight, class Keep>
Cut<Acc> find_cut(const Acc* x, const int64_t* mass, int64_t V, std::vector<int32_t>& candidates, Weight weight,
                  Keep keep) {
  candidates.clear();
  for (int64_t v = 0; v < V; ++v) {
    if (mass[v] > 0) candidates.push_back(static_cast<int32_t>(v));
  }
  uint64_t before = 0;
  while (static_cast<int64_t>(candidates.size()) > kSortBelow) {
    const auto [low, high] =
        std::minmax_element(candidates.begin(), candidates.end(), [x](int32_t a, int32_t b) { return x[a] < x[b]; });
    const Acc top = x[*high], span = top - x[*low];
    if (!(span > 0)) break;  // all equal: index order is rank order
    const auto bucket_of = [&](int32_t v) {
      return std::min(kBuckets - 1, static_cast<int>((top - x[v]) / span * static_cast<Acc>(kBuckets)));
    };
    uint64_t sums[kBuckets] = {};
    for (const int32_t v : candidates) sums[bucket_of(v)] += weight(v);
    int bucket = 0, last_used = 0;
    for (int b = 0; b < kBuckets; ++b) last_used = sums[b] > 0 ? b : last_used;
    while (bucket < last_used && keep(before + sums[bucket])) before += sums[bucket++];
    const size_t n = candidates.size();
    candidates.erase(
        std::remove_if(candidates.begin(), candidates.end(), [&](int32_t v) { return bucket_of(v) != bucket; }),
        candidates.end());
    if (candidates.size() == n) break;
  }
  std::stable_sort(candidates.begin(), candidates.end(), [x](int32_t a, int32_t b) { return x[a] > x[b]; });
  int32_t last = candidates.front();
  for (const int32_t v : candidates) {
    if (!keep(before)) break;
    last = v;
    before += weight(v);
  }
  return {x[last], last};
}

template <class Acc>
struct Scratch {
  explicit Scratch(int64_t V) : x(V), mass(V) {}
  std::vector<Acc> x;
  std::vector<int64_t> mass;
  std::vector<int32_t> candidates;
};

// Zeroes the masses outside top-k, then outside top-p of what is left.
template <class Acc>
void truncate(Scratch<Acc>& s, int64_t V, const DrawOptions& options) {
  if (options.top_k > 0 && options.top_k < V) {
    const uint64_t k = static_cast<uint64_t>(options.top_k);
    apply_cut(s.x.data(), V,
              find_cut(
                  s.x.data(), s.mass.data(), V, s.candidates, [](int32_t) { return uint64_t{1}; },
                  [k](uint64_t before) { return before < k; }),
              s.mass.data());
  }
  if (options.top_p < 1.0) {
    const uint64_t total = std::accumulate(s.mass.begin(), s.mass.end(), uint64_t{0});
    apply_cut(
        s.x.data(), V,
        find_cut(
            s.x.data(), s.mass.data(), V, s.candidates, [&](int32_t v) { return static_cast<uint64_t>(s.mass[v]); },
            [&](uint64_t before) { return in_nucleus(before, total, options.top_p); }),
        s.mass.data());
  }
}

// First index whose inclusive cumulative mass exceeds the target; sample_prob is its share.
int64_t draw(const std::vector<int64_t>& mass, uint64_t uniform62, float& sample_prob) {
  const int64_t V = static_cast<int64_t>(mass.size());
  std::vector<uint64_t> tile_sum((V + kTile - 1) / kTile);
  for (size_t t = 0; t < tile_sum.size(); ++t) {
    const auto begin = mass.begin() + static_cast<int64_t>(t) * kTile;
    tile_sum[t] = std::accumulate(begin, begin + std::min(kTile, V - static_cast<int64_t>(t) * kTile), uint64_t{0});
  }
  const uint64_t total = std::accumulate(tile_sum.begin(), tile_sum.end(), uint64_t{0});
  uint64_t target = draw_target(uniform62, total);  // below total
  int64_t tile = 0;
  while (target >= tile_sum[tile]) target -= tile_sum[tile++];
  int64_t v = tile * kTile;
  while (target >= static_cast<uint64_t>(mass[v])) target -= static_cast<uint64_t>(mass[v++]);
  sample_prob = static_cast<float>(static_cast<double>(mass[v]) / static_cast<double>(total));
  return v;
}

template <class T, class Acc>
Stats row_stats(const T* logits, int64_t V, int64_t current, const DrawOptions& options, uint64_t uniform62,
                Scratch<Acc>& s) {
  Stats out;
  std::fill(std::begin(out.values), std::end(out.values), std::nanf(""));
  Acc* x = s.x.data();
  const bool no_nan = load_logits(logits, V, x);
  const bool forbidden_nan = options.forbid >= 0 && x[options.forbid] != x[options.forbid];
  if (options.forbid >= 0) x[options.forbid] = -std::numeric_limits<Acc>::infinity();
  if (!no_nan && !(forbidden_nan && std::none_of(x, x + V, [](Acc v) { return v != v; }))) return out;
  const Acc max = row_max(x, V);
  if (!std::isfinite(max)) return out;  // +inf, or nothing allowed

  const int64_t top = std::find(x, x + V, max) - x;
  x[top] = -std::numeric_limits<Acc>::infinity();
  const Acc second = row_max(x, V);
  x[top] = max;
  const double sum = row_sum_exp(x, V, max), lse = static_cast<double>(max) + std::log(sum);
  const auto prob = [&](int64_t v) {
    return v >= 0 && v < V ? static_cast<float>(std::exp(static_cast<double>(x[v]) - lse)) : std::nanf("");
  };
  float sample_prob = 1.0f;
  out.token = top;
  if (options.temperature > 0) {
    masses(x, V, max, static_cast<Acc>(std::clamp(options.temperature, kLowest, kHighest)), s.mass.data());
    truncate(s, V, options);
    out.token = draw(s.mass, uniform62, sample_prob);
  }
  const float values[8] = {prob(out.token),
                           sample_prob,
                           static_cast<float>(1.0 / sum),
                           static_cast<float>(std::exp(static_cast<double>(second) - lse)),
                           static_cast<float>(max - second),
                           static_cast<float>(std::log(sum) - sum_d_exp(x, V, max) / sum),
                           static_cast<float>(lse),
                           prob(current)};
  std::copy(std::begin(values), std::end(values), out.values);
  return out;
}

std::tuple<Tensor, Tensor> token_stats_cpu(const Tensor& logits, std::optional<Tensor> current, const Tensor& row_index,
                                           const Tensor& seed, const Tensor& step, double temperature, int64_t top_k,
                                           double top_p, int64_t forbid) {
  const DrawOptions options{temperature, top_k, top_p, forbid};
  check_token_stats(logits, current, row_index, seed, step, options);
  const int64_t N = logits.size(0), V = logits.size(1);
  const Tensor logits_c = as_contiguous(logits), index_c = as_contiguous(row_index);
  const std::optional<Tensor> current_c = as_contiguous(current);
  Tensor token = empty_like_device(logits, {N}, ScalarType::Long),
         values = empty_like_device(logits, {8, N}, ScalarType::Float);
  const uint64_t key = static_cast<uint64_t>(scalar_of("seed", seed));
  const uint32_t stream = static_cast<uint32_t>(scalar_of("step", step));
  const int64_t* index = index_c.const_data_ptr<int64_t>();
  const int64_t* current_data = current_c ? current_c->const_data_ptr<int64_t>() : nullptr;
  int64_t* token_data = token.mutable_data_ptr<int64_t>();
  float* values_data = values.mutable_data_ptr<float>();
  with_float_type(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = Wide<T>;
    const T* in = logits_c.const_data_ptr<T>();
    torch::stable::parallel_for(0, N, std::max<int64_t>(1, 16384 / V), [&](int64_t begin, int64_t end) {
      Scratch<Acc> scratch(V);
      for (int64_t n = begin; n < end; ++n) {
        const uint64_t uniform62 = row_uniform62(key, static_cast<uint64_t>(index[n]), stream);
        const Stats stats = row_stats(in + n * V, V, current_data ? current_data[n] : -1, options, uniform62, scratch);
        token_data[n] = stats.token;
        for (int k = 0; k < 8; ++k) values_data[k * N + n] = stats.values[k];
      }
    });
  });
  return {token, values};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) { m.impl("token_stats", TORCH_BOX(&diffullama::token_stats_cpu)); }
