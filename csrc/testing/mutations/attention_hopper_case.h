// SPDX-License-Identifier: Apache-2.0
// Operands and masks for the programs that break the sm_90a attention kernels, without torch.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../attention/attention_hopper_kernel.h"
#include "../../attention_mask/attention_mask_math.h"
#include "../cuda/cuda_bf16.h"
#include "../cuda/cuda_fp16.h"

namespace diffullama {

struct Case {
  int B, H, Hkv, Lq, Lk, D;
  bool is_half, causal, bits, classes, padding, each;  // each: a mask for every sequence
};

inline double value_of(const Case& c, uint16_t bits) {
  return c.is_half ? simulator::float_of_half(bits) : simulator::float_of_bfloat16(bits);
}

// Repeatable numbers in [-1, 1).
inline float number(uint32_t index) {
  const Words4 words = philox_of_sample(1, 0, index, Tag::kNoise);
  return static_cast<float>(static_cast<int32_t>(words.w[0])) * 0x1p-31f;
}

// q, k or v as [B, L, heads, D], with room behind every row; and their exact values. They grow along L, so that later
// keys bring larger scores.
struct Operand {
  int heads, L, D;
  std::vector<uint16_t> bits;
  std::vector<double> value;

  Operand(const Case& c, int heads, int L, uint32_t first, float magnitude)
      : heads(heads), L(L), D(c.D), bits(size_t(c.B) * L * stride()), value(bits.size()) {
    for (size_t i = 0; i < bits.size(); ++i) {
      const float growth = 1.0f + 3.0f * static_cast<float>(i / stride() % L) / static_cast<float>(L);
      const float v = growth * magnitude * number(first + static_cast<uint32_t>(i));
      bits[i] = c.is_half ? simulator::half_of_float(v) : simulator::bfloat16_of_float(v);
      value[i] = value_of(c, bits[i]);
    }
  }

  int stride() const { return heads * D + 8; }
  const double* row(int b, int h, int i) const { return value.data() + (size_t(b) * L + i) * stride() + h * D; }
  AttentionOperand operand() const { return {bits.data(), int64_t{L} * stride(), D, stride()}; }
};

struct Mask {
  int M, W;
  std::vector<uint32_t> words, fragments, transposed_fragments, key_words;
  std::vector<uint8_t> classes;
  int64_t fragments_batch, transposed_batch, classes_batch;

  explicit Mask(const Case& c) : M(c.each ? c.B : 1), W((c.Lk + 31) / 32), key_words(size_t(c.B) * W) {
    words.resize(size_t(M) * c.Lq * W);
    for (size_t i = 0; i < words.size(); ++i) {
      const int q = static_cast<int>(i / W) % c.Lq, w = static_cast<int>(i % W);
      const uint32_t tail = bits_up_to(c.Lk - 1, w);
      words[i] = static_cast<uint32_t>(std::lround(number(static_cast<uint32_t>(i)) * 2147483000.0)) & tail;
      if (q % 128 < 64 && w / 4 == 1) words[i] = tail;  // everything
      if (q >= 64 && w / 2 == 0) words[i] = 0;          // nothing
      if (q % 50 == 3) words[i] = 0;                    // empty rows
    }
    for (size_t i = 0; i < key_words.size(); ++i) {
      const int last = c.Lk - 1 - 40 * static_cast<int>(i / W + 1);
      key_words[i] = bits_up_to(last, static_cast<int64_t>(i % W)) & ~(i % W ? 0u : 6u);
    }
    fragments_batch = make_fragments(c, false, fragments);
    transposed_batch = make_fragments(c, true, transposed_fragments);
    make_classes(c);
  }

  AttentionMaskParams params(const Case& c) const {
    AttentionMaskParams p{};
    if (c.bits) p.words = words.data();
    if (c.bits && M > 1) p.words_batch = int64_t{c.Lq} * W;
    if (c.bits && c.classes) p.classes = classes.data(), p.classes_batch = classes_batch;
    if (c.padding) p.key_words = key_words.data();
    p.causal = c.causal;
    return p;
  }

  bool allows(const Case& c, int b, int q, int key) const {
    const auto bit = [&](const uint32_t* row) { return row[key / 32] >> key % 32 & 1u; };
    if (c.causal && key > q) return false;
    if (c.padding && !bit(&key_words[size_t(b) * W])) return false;
    return !c.bits || bit(&words[(size_t(M > 1 ? b : 0) * c.Lq + q) * W]);
  }

 private:
  uint32_t bit(const Case& c, int m, int q, int key) const {
    return q < c.Lq && key < c.Lk ? words[(size_t(m) * c.Lq + q) * W + key / 32] >> key % 32 & 1u : 0;
  }

  // Returns the stride of M.
  int64_t make_fragments(const Case& c, bool transpose, std::vector<uint32_t>& out) const {
    const int rows = ((transpose ? c.Lk : c.Lq) + 63) / 64, columns = ((transpose ? c.Lq : c.Lk) + 127) / 128;
    out.resize(size_t(M) * rows * columns * 256);
    for (size_t at = 0; at < out.size() * 32; ++at) {
      const int i = static_cast<int>(at % 64), thread = static_cast<int>(at / 64 % 128), n = i / 4;
      const int tile = static_cast<int>(at / 8192 % (size_t(rows) * columns)),
                m = static_cast<int>(at / 8192) / (rows * columns);
      const int row = tile / columns * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
      const int column = tile % columns * 128 + 8 * n + 2 * (thread % 4) + i % 2;
      out[at / 32] |= (transpose ? bit(c, m, column, row) : bit(c, m, row, column)) << at % 32;
    }
    return M > 1 ? int64_t{rows} * columns * 256 : 0;
  }

  void make_classes(const Case& c) {
    const int rows = (c.Lq + 63) / 64, columns = (c.Lk + 63) / 64;
    classes_batch = M > 1 ? int64_t{rows} * columns : 0;
    for (int t = 0; t < M * rows * columns; ++t) {
      bool any = false, all = true;
      for (int i = 0; i < 64 * 64; ++i) {
        const int q = t / columns % rows * 64 + i / 64, key = t % columns * 64 + i % 64;
        if (q >= c.Lq || key >= c.Lk) continue;
        (bit(c, t / (rows * columns), q, key) ? any : all) = bit(c, t / (rows * columns), q, key);
      }
      classes.push_back(static_cast<uint8_t>(tile_class(any, !all)));
    }
  }
};

// Runs the cases whose numbers are given, or all: the status of main.
template <size_t n>
int run_cases(const Case (&cases)[n], bool (*agrees)(const Case&, int), int argc, char** argv) {
  std::vector<int> chosen;
  for (int i = 1; i < argc; ++i) chosen.push_back(std::atoi(argv[i]));
  for (size_t i = 0; argc < 2 && i < n; ++i) chosen.push_back(static_cast<int>(i));
  for (const int i : chosen) {
    if (!agrees(cases[i], i)) return 1;
  }
  std::puts("agrees");
  return 0;
}

}  // namespace diffullama
