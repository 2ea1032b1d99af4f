// SPDX-License-Identifier: Apache-2.0
// mask_tokens on the CPU: rows in parallel, 64 tokens (16 counters) at a time.
#include "noising.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "../common/philox_lanes.h"
#include "noising_math.h"

namespace diffullama {
namespace {

constexpr int64_t kTile = 4 * kPhiloxLanes;  // tokens of one philox_lanes call

struct Row {
  const int64_t* x0;    // [L]
  const float* p_mask;  // [L], or [1] where p_stride is 0
  int64_t p_stride;
  const uint8_t* maskable;  // [L] or null
  int64_t* xt;              // [L]
  uint8_t* masked;          // [L]
  int64_t L;
  uint64_t sample_index;
};

// One tile of random words: word of position 4 * (group + lane) + k is words[k][lane].
inline __attribute__((always_inline)) void draw_tile(uint32_t (&words)[4][kPhiloxLanes], const Row& row, int64_t group,
                                                     uint64_t seed) {
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    words[0][lane] = static_cast<uint32_t>(group + lane);
    words[1][lane] = static_cast<uint32_t>(row.sample_index);
    words[2][lane] = static_cast<uint32_t>(Tag::kNoise);
    words[3][lane] = static_cast<uint32_t>(row.sample_index >> 32);
  }
  philox_lanes(words, seed);
}

// hits[j] = word j below its threshold and maskable, for one tile. Plain loops over arrays: they vectorise.
inline __attribute__((always_inline)) void decide_tile(const uint32_t* words, const Row& row, int64_t begin, int64_t n,
                                                       uint64_t row_threshold, uint8_t* hits) {
  if (row.p_stride == 0 && row_threshold == kCertain) {
    for (int64_t j = 0; j < n; ++j) hits[j] = 1;
  } else if (row.p_stride == 0) {
    const auto threshold = static_cast<uint32_t>(row_threshold);
    for (int64_t j = 0; j < n; ++j) hits[j] = words[j] < threshold;  // is_masked in 32 bits
  } else {
    for (int64_t j = 0; j < n; ++j) hits[j] = is_masked(words[j], threshold32(row.p_mask[begin + j]), true);
  }
  if (row.maskable == nullptr) return;
  for (int64_t j = 0; j < n; ++j) hits[j] &= row.maskable[begin + j];
}

inline __attribute__((always_inline)) int64_t write_tile(const uint8_t* __restrict hits, const int64_t* __restrict x0,
                                                         int64_t n, int64_t mask_id, int64_t* __restrict xt,
                                                         uint8_t* __restrict masked) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t clean = x0[j];
    xt[j] = hits[j] ? mask_id : clean;
    masked[j] = hits[j];
    count += hits[j];
  }
  return count;
}

// Masks one row; returns the number of masked tokens.
DIFFULLAMA_VECTORIZED int64_t mask_row(const Row& row, uint64_t seed, int64_t mask_id) {
  int64_t count = 0;
  const uint64_t row_threshold = row.L > 0 ? threshold32(row.p_mask[0]) : 0;
  for (int64_t begin = 0; begin < row.L; begin += kTile) {
    uint32_t words[4][kPhiloxLanes], by_position[kTile];
    uint8_t hits[kTile];
    draw_tile(words, row, begin / 4, seed);
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      for (int k = 0; k < 4; ++k) by_position[4 * lane + k] = words[k][lane];
    }
    const int64_t n = std::min(kTile, row.L - begin);
    decide_tile(by_position, row, begin, n, row_threshold, hits);
    count += write_tile(hits, row.x0 + begin, n, mask_id, row.xt + begin, row.masked + begin);
  }
  return count;
}

// Flat positions of the True entries of masked [L], ascending; out has room for exactly their number.
void write_positions(const uint8_t* masked, int64_t L, int64_t base, int64_t* out) {
  int64_t buffer[kTile + 1];  // branch-free: every entry is stored, only hits advance
  for (int64_t begin = 0; begin < L; begin += kTile) {
    const int64_t n = std::min(kTile, L - begin);
    int64_t found = 0;
    for (int64_t j = 0; j < n; ++j) {
      buffer[found] = base + begin + j;
      found += masked[begin + j];
    }
    out = std::copy(buffer, buffer + found, out);
  }
}

void check_probabilities(const float* p, int64_t n) {
  bool ok = true;
  for (int64_t i = 0; i < n; ++i) ok &= p[i] >= 0.0f && p[i] <= 1.0f;  // false for NaN
  if (ok) return;
  const float* bad = std::find_if(p, p + n, [](float v) { return !(v >= 0.0f && v <= 1.0f); });
  check(false, "p_mask must be in [0, 1], got ", *bad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_tokens_cpu(const Tensor& x0, const Tensor& p_mask,
                                                           std::optional<Tensor> maskable, const Tensor& seed,
                                                           const Tensor& sample_index, int64_t mask_id) {
  check_mask_tokens(x0, p_mask, maskable, seed, sample_index, mask_id);
  const int64_t B = x0.size(0), L = x0.size(1);
  const Tensor x0_c = as_contiguous(x0), p_c = as_contiguous(p_mask);
  const Tensor index_c = as_contiguous(sample_index);
  const std::optional<Tensor> maskable_c = as_contiguous(maskable);
  Tensor xt = empty_like_device(x0, {B, L}, ScalarType::Long), masked = empty_like_device(x0, {B, L}, ScalarType::Bool);
  Tensor positions = empty_like_device(x0, {B * L}, ScalarType::Long),
         counts = empty_like_device(x0, {B}, ScalarType::Long);

  const float* p = p_c.const_data_ptr<float>();
  check_probabilities(p, p_c.numel());
  const int64_t p_stride = p_mask.dim() == 2 ? L : 0;
  const int64_t *x0_data = x0_c.const_data_ptr<int64_t>(), *index = index_c.const_data_ptr<int64_t>();
  const uint8_t* maskable_data = maskable_c ? const_bytes(*maskable_c) : nullptr;
  int64_t *xt_data = xt.mutable_data_ptr<int64_t>(), *counts_data = counts.mutable_data_ptr<int64_t>();
  uint8_t* masked_data = mutable_bytes(masked);
  const uint64_t key = static_cast<uint64_t>(scalar_of("seed", seed));
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(L, 1));

  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Row row{x0_data + b * L,
                    p + (p_stride ? b * p_stride : b),
                    p_stride,
                    maskable_data ? maskable_data + b * L : nullptr,
                    xt_data + b * L,
                    masked_data + b * L,
                    L,
                    static_cast<uint64_t>(index[b])};
      counts_data[b] = mask_row(row, key, mask_id);
    }
  });

  std::vector<int64_t> offset(B + 1, 0);
  std::partial_sum(counts_data, counts_data + B, offset.begin() + 1);
  int64_t* positions_data = positions.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) write_positions(masked_data + b * L, L, b * L, positions_data + offset[b]);
  });
  std::fill(positions_data + offset[B], positions_data + B * L, -1);
  return {xt, masked, positions, counts};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) { m.impl("mask_tokens", TORCH_BOX(&diffullama::mask_tokens_cpu)); }
