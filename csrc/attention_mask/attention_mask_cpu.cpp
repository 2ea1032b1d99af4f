// SPDX-License-Identifier: Apache-2.0
// Making, packing and unpacking mask words on the CPU, one row of one mask at a time.
#include "attention_mask.h"

#include <algorithm>

#include "../common/philox_lanes.h"
#include "attention_mask_math.h"

namespace diffullama {
namespace {

// The word whose bit j is byte j of 32 bools (0 or 1).
inline uint32_t pack_word(const uint8_t* bytes) {
  uint32_t word = 0;
  for (int j = 0; j < 32; ++j) word |= static_cast<uint32_t>(bytes[j]) << j;
  return word;
}

DIFFULLAMA_VECTORIZED void pack_row(const uint8_t* bytes, int64_t k_length, uint32_t* words) {
  const int64_t whole = k_length / 32;
  for (int64_t w = 0; w < whole; ++w) words[w] = pack_word(bytes + 32 * w);
  if (k_length % 32) {
    uint8_t tail[32] = {};
    std::copy(bytes + 32 * whole, bytes + k_length, tail);
    words[whole] = pack_word(tail);
  }
}

DIFFULLAMA_VECTORIZED void unpack_row(const uint32_t* words, int64_t k_length, uint8_t* allowed) {
  const int64_t whole = k_length / 32;
  for (int64_t w = 0; w < whole; ++w) {
    for (int j = 0; j < 32; ++j) allowed[32 * w + j] = (words[w] >> j) & 1u;
  }
  for (int64_t j = 32 * whole; j < k_length; ++j) allowed[j] = (words[whole] >> (j % 32)) & 1u;
}

DIFFULLAMA_VECTORIZED void id_row(int64_t query_id, const int64_t* key_ids, int64_t k_length, bool exact,
                                  uint32_t* words) {
  for (int64_t w = 0; w < words_per_row(k_length); ++w) {
    const int n = static_cast<int>(std::min<int64_t>(32, k_length - 32 * w));
    uint8_t bytes[32] = {};
    for (int j = 0; j < n; ++j) bytes[j] = allows(query_id, key_ids[32 * w + j], exact);
    words[w] = pack_word(bytes);
  }
}

// Row i of causal OR Bernoulli. Words wholly below the diagonal need no draw; planes below the lowest set bit of the
// threshold change nothing.
DIFFULLAMA_VECTORIZED void annealed_row(int64_t i, int64_t length, uint64_t threshold, uint64_t seed, uint32_t stream,
                                        uint32_t* words) {
  const int64_t n_words = words_per_row(length), first_drawn = (i + 1) / 32;
  for (int64_t w = 0; w < std::min(first_drawn, n_words); ++w) words[w] = 0xffffffffu;
  const bool drawn = threshold > 0 && threshold < kCertain;
  const int lowest_plane = drawn ? __builtin_ctzll(threshold) : 32;
  for (int64_t begin = first_drawn; begin < n_words; begin += kPhiloxLanes) {
    uint32_t r[kPhiloxLanes] = {};
    for (int plane = lowest_plane / 4 * 4; plane < 32; plane += 4) {
      uint32_t c[4][kPhiloxLanes];
      for (int lane = 0; lane < kPhiloxLanes; ++lane) {
        const uint64_t index4 = plane_index4(i, begin + lane, plane);
        c[0][lane] = static_cast<uint32_t>(index4);
        c[1][lane] = static_cast<uint32_t>(index4 >> 32);
        c[2][lane] = static_cast<uint32_t>(Tag::kAttentionMask);
        c[3][lane] = stream;
      }
      philox_lanes(c, seed);
      for (int k = 0; k < 4; ++k) {
        const uint32_t set = (threshold >> (plane + k)) & 1 ? 0xffffffffu : 0u;  // bernoulli_plane, without its branch
        for (int lane = 0; lane < kPhiloxLanes; ++lane) r[lane] = (r[lane] & (c[k][lane] | set)) | (c[k][lane] & set);
      }
    }
    const int n = static_cast<int>(std::min<int64_t>(kPhiloxLanes, n_words - begin));
    for (int lane = 0; lane < n; ++lane) {
      const uint32_t bits = threshold >= kCertain ? 0xffffffffu : r[lane];
      words[begin + lane] = (bits | bits_up_to(i, begin + lane)) & bits_up_to(length - 1, begin + lane);
    }
  }
}

// f(mask, row) for every row of n_masks masks, in parallel.
template <class F>
void for_each_row(int64_t n_masks, int64_t q_length, int64_t work_per_row, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_row));
  torch::stable::parallel_for(0, n_masks * q_length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row / q_length, row % q_length);
  });
}

Tensor empty_words(const Tensor& like, int64_t n_masks, int64_t q_length, int64_t k_length) {
  return empty_like_device(like, {n_masks, q_length, words_per_row(k_length)}, ScalarType::Int);
}

uint32_t* words_data(const Tensor& words) { return reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()); }

Tensor pack_mask_cpu(const Tensor& allowed) {
  check_pack_mask(allowed);
  const int64_t M = allowed.size(0), Lq = allowed.size(1), Lk = allowed.size(2), W = words_per_row(Lk);
  const Tensor allowed_c = as_contiguous(allowed);
  Tensor words = empty_words(allowed, M, Lq, Lk);
  const uint8_t* in = const_bytes(allowed_c);
  uint32_t* out = words_data(words);
  for_each_row(M, Lq, Lk, [&](int64_t m, int64_t q) { pack_row(in + (m * Lq + q) * Lk, Lk, out + (m * Lq + q) * W); });
  return words;
}

Tensor unpack_mask_cpu(const Tensor& words, int64_t k_length) {
  check_unpack_mask(words, k_length);
  const int64_t M = words.size(0), Lq = words.size(1), W = words.size(2);
  const Tensor words_c = as_contiguous(words);
  Tensor allowed = empty_like_device(words, {M, Lq, k_length}, ScalarType::Bool);
  const auto* in = reinterpret_cast<const uint32_t*>(words_c.const_data_ptr<int32_t>());
  uint8_t* out = mutable_bytes(allowed);
  for_each_row(M, Lq, k_length, [&](int64_t m, int64_t q) {
    unpack_row(in + (m * Lq + q) * W, k_length, out + (m * Lq + q) * k_length);
  });
  return allowed;
}

Tensor id_mask_cpu(const Tensor& query_ids, const Tensor& key_ids, bool exact) {
  check_id_mask(query_ids, key_ids);
  const int64_t M = query_ids.size(0), Lq = query_ids.size(1), Lk = key_ids.size(1), W = words_per_row(Lk);
  const Tensor query_c = as_contiguous(query_ids), key_c = as_contiguous(key_ids);
  Tensor words = empty_words(query_ids, M, Lq, Lk);
  const int64_t *query = query_c.const_data_ptr<int64_t>(), *key = key_c.const_data_ptr<int64_t>();
  uint32_t* out = words_data(words);
  for_each_row(M, Lq, Lk, [&](int64_t m, int64_t q) {
    id_row(query[m * Lq + q], key + m * Lk, Lk, exact, out + (m * Lq + q) * W);
  });
  return words;
}

Tensor annealed_mask_cpu(int64_t length, const Tensor& attn_mask_ratio, const Tensor& seed, const Tensor& step) {
  check_annealed_mask(length, attn_mask_ratio, seed, step);
  Tensor words = empty_words(attn_mask_ratio, 1, length, length);
  const uint64_t threshold = threshold32(*attn_mask_ratio.const_data_ptr<float>());
  const auto key = static_cast<uint64_t>(scalar_of("seed", seed));
  const auto stream = static_cast<uint32_t>(scalar_of("step", step));
  uint32_t* out = words_data(words);
  const int64_t W = words_per_row(length);
  for_each_row(1, length, 64 * W,
               [&](int64_t, int64_t i) { annealed_row(i, length, threshold, key, stream, out + i * W); });
  return words;
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&diffullama::pack_mask_cpu));
  m.impl("unpack_mask", TORCH_BOX(&diffullama::unpack_mask_cpu));
  m.impl("id_mask", TORCH_BOX(&diffullama::id_mask_cpu));
  m.impl("annealed_mask", TORCH_BOX(&diffullama::annealed_mask_cpu));
}
