// SPDX-License-Identifier: Apache-2.0
// Loss and gradient of one row of logits on the CPU, staged in Acc (float or double).
#pragma once

#include <cmath>
#include <stdexcept>
#include <vector>

#include "../common/row_math.h"
#include "shifted_cross_entropy.h"
#include "shifted_cross_entropy_math.h"

namespace diffullama {

// A token that is scored: flat index b * L + j of the token and of the logits row that predicts it.
struct Scored {
  int64_t token, row;
};

inline std::vector<Scored> scored_tokens(const bool* masked, int64_t B, int64_t L, bool shift) {
  std::vector<Scored> scored;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t j = shift ? 1 : 0; j < L; ++j) {
      if (masked[b * L + j]) scored.push_back({b * L + j, b * L + scoring_row(j, shift)});
    }
  }
  return scored;
}

inline void check_ids(const std::vector<Scored>& scored, const int64_t* x0, int64_t vocab) {
  for (const Scored& s : scored) {
    if (x0[s.token] < 0 || x0[s.token] >= vocab) {
      throw std::out_of_range("x0 has the id " + std::to_string(x0[s.token]) +
                              " at a masked position, outside the vocabulary [0, " + std::to_string(vocab) + ")");
    }
  }
}

template <class Acc>
DIFFULLAMA_VECTORIZED void add_bias(Acc* z, const Acc* bias, int64_t V) {
  for (int64_t v = 0; v < V; ++v) z[v] += bias[v];
}

template <class Acc>
void apply_softcap(Acc* z, int64_t V, Acc softcap) {
  for (int64_t v = 0; v < V; ++v) z[v] = softcap * std::tanh(z[v] / softcap);
}

// logsumexp of the row; log of the double sum, so that a large V costs no precision. NaN spreads.
template <class Acc>
Acc row_lse(const Acc* z, int64_t V) {
  const Acc max = row_max(z, V);
  if (max == -std::numeric_limits<Acc>::infinity()) return row_sum_values(z, V) == max ? max : std::nan("");
  return static_cast<Acc>(static_cast<double>(max) + std::log(row_sum_exp(z, V, max)));
}

template <class Acc>
Acc row_loss(const Acc* z, int64_t V, int64_t target, Acc lse, Acc smoothing) {
  const Acc mean = smoothing == Acc(0) ? Acc(0) : static_cast<Acc>(row_sum_values(z, V) / static_cast<double>(V));
  return row_nll(lse, z[target], mean, smoothing);
}

// z becomes scale * d nll / d z of the uncapped logits, in place.
template <class Acc>
DIFFULLAMA_VECTORIZED void row_gradient(Acc* z, int64_t V, int64_t target, Acc lse, Acc scale, Acc smoothing,
                                        Acc softcap) {
  const Acc uniform = smoothing / static_cast<Acc>(V);
  const Acc target_logit = z[target];
  if (softcap == Acc(0)) {
    for (int64_t v = 0; v < V; ++v) z[v] = scale * (exp_nonpositive(z[v] - lse) - uniform);
    z[target] -= scale * (Acc(1) - smoothing);
  } else {
    for (int64_t v = 0; v < V; ++v) {
      z[v] = scale * (exp_nonpositive(z[v] - lse) - uniform) * softcap_slope(z[v], softcap);
    }
    z[target] -= scale * (Acc(1) - smoothing) * softcap_slope(target_logit, softcap);
  }
}

}  // namespace diffullama
