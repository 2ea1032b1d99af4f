// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "../common/tensor.h"
#include "unmasking_math.h"

namespace diffullama {

struct DrawOptions {
  double temperature;  // 0 is greedy
  int64_t top_k;       // 0 is none
  double top_p;        // 1 is none
  int64_t forbid;      // negative is none
};

// logits [N, V] float, current and row_index [N] int64.
inline void check_token_stats(const Tensor& logits, const std::optional<Tensor>& current, const Tensor& row_index,
                              const Tensor& seed, const Tensor& step, const DrawOptions& options) {
  check(is_floating(logits.scalar_type()), "logits must be a float tensor");
  check_tensor("logits", logits, logits.scalar_type(), {kAny, kAny});
  check(logits.size(1) > 0 && logits.size(1) <= (int64_t{1} << 18), "logits must have 1 to 2^18 columns, got ",
        logits.size(1));
  const int64_t N = logits.size(0);
  if (current) check_tensor("current", *current, ScalarType::Long, {N}, &logits);
  check_tensor("row_index", row_index, ScalarType::Long, {N}, &logits);
  check_tensor("seed", seed, ScalarType::Long, {1}, &logits);
  check_tensor("step", step, ScalarType::Long, {1}, &logits);
  check(options.temperature >= 0, "temperature must be at least 0, got ", options.temperature);
  check(options.top_k >= 0, "top_k must be at least 0, got ", options.top_k);
  check(options.top_p > 0 && options.top_p <= 1, "top_p must be in (0, 1], got ", options.top_p);
  check(options.forbid < logits.size(1), "forbid must be below ", logits.size(1), ", got ", options.forbid);
}

inline Rule parse_rule(const std::string& rule) {
  if (rule == "quota") return Rule::kQuota;
  if (rule == "threshold") return Rule::kThreshold;
  if (rule == "factor") return Rule::kFactor;
  check(rule == "random", "rule must be quota, threshold, factor or random, got ", rule);
  return Rule::kRandom;
}

// xt, masked, token, confidence [B, L]; amount and sample_index [B].
inline void check_unmask(const Tensor& xt, const Tensor& masked, const Tensor& token, const Tensor& confidence,
                         const Tensor& amount, const Tensor& seed, const Tensor& step, const Tensor& sample_index) {
  check_tensor("xt", xt, ScalarType::Long, {kAny, kAny});
  const int64_t B = xt.size(0), L = xt.size(1);
  check_tensor("masked", masked, ScalarType::Bool, {B, L}, &xt);
  check_tensor("token", token, ScalarType::Long, {B, L}, &xt);
  check_tensor("confidence", confidence, ScalarType::Float, {B, L}, &xt);
  check_tensor("amount", amount, ScalarType::Float, {B}, &xt);
  check_tensor("seed", seed, ScalarType::Long, {1}, &xt);
  check_tensor("step", step, ScalarType::Long, {1}, &xt);
  check_tensor("sample_index", sample_index, ScalarType::Long, {B}, &xt);
}

}  // namespace diffullama
