// SPDX-License-Identifier: Apache-2.0
// Reductions over one row of logits on the CPU, in kLanes partial results so that every x86-64 level rounds alike.
#pragma once

#include <cstdint>
#include <limits>

#include "exp.h"
#include "macros.h"

namespace diffullama {

constexpr int kLanes = 16;
constexpr int64_t kSumBlock = 4096;  // float partial sums stay short; blocks add up in double

template <class Acc>
DIFFULLAMA_VECTORIZED Acc row_max(const Acc* x, int64_t n) {
  Acc lane_max[kLanes];
  for (Acc& m : lane_max) m = -std::numeric_limits<Acc>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane)
      lane_max[lane] = x[i + lane] > lane_max[lane] ? x[i + lane] : lane_max[lane];
  }
  Acc result = lane_max[0];
  for (int lane = 1; lane < kLanes; ++lane) result = lane_max[lane] > result ? lane_max[lane] : result;
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// Sum of value(x[i]) over the row, value a vectorisable function.
template <class Acc, class Value>
static inline __attribute__((always_inline)) double row_sum(const Acc* x, int64_t n, Value value) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
    Acc lane_sum[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lane_sum[lane] += value(x[i + lane]);
    }
    for (; i < end; ++i) lane_sum[(i - begin) % kLanes] += value(x[i]);
    for (const Acc s : lane_sum) total += static_cast<double>(s);
  }
  return total;
}

template <class Acc>
DIFFULLAMA_VECTORIZED double row_sum_exp(const Acc* x, int64_t n, Acc max) {
  return row_sum(x, n, [max](Acc v) { return exp_nonpositive(v - max); });
}

template <class Acc>
DIFFULLAMA_VECTORIZED double row_sum_values(const Acc* x, int64_t n) {
  return row_sum(x, n, [](Acc v) { return v; });
}

}  // namespace diffullama
