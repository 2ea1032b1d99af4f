// SPDX-License-Identifier: Apache-2.0
// attention_hopper_forward_kernel against a loop on the host in double, without torch: tests break the kernel and look
// whether it still agrees. Prints "agrees", the first difference, or the launch's error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../attention/attention_hopper_kernel.h"
#include "../../attention_mask/attention_mask_math.h"
#include "../cuda/cuda_bf16.h"
#include "../cuda/cuda_fp16.h"

namespace diffullama {
namespace {

struct Case {
  int B, H, Hkv, Lq, Lk, D;
  bool is_half, causal, bits, classes, padding, each;  // each: a mask for every sequence
};

// Tiles are 128 or 192 queries by 128 keys: one, several, and parts of them; empty rows wherever there are bits.
const Case kCases[] = {
    {1, 1, 1, 1, 1, 128, true, false, false, false, false, false},
    {1, 2, 1, 130, 700, 128, true, false, false, false, false, false},
    {2, 2, 1, 130, 300, 128, true, true, false, false, false, false},
    {2, 2, 2, 200, 257, 128, false, false, true, true, true, true},
    {2, 2, 1, 65, 400, 128, true, false, true, true, false, false},
    {1, 1, 1, 65, 140, 128, true, false, true, false, true, false},
    {1, 4, 2, 200, 1300, 64, true, false, false, false, false, false},
    {2, 2, 1, 193, 300, 64, false, false, true, true, true, true},
    {2, 3, 1, 200, 129, 64, true, true, false, false, true, false},
};

// Repeatable numbers in [-1, 1).
float number(uint32_t index) {
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
      value[i] = c.is_half ? simulator::float_of_half(bits[i]) : simulator::float_of_bfloat16(bits[i]);
    }
  }

  int stride() const { return heads * D + 8; }
  const double* row(int b, int h, int i) const { return value.data() + (size_t(b) * L + i) * stride() + h * D; }
  AttentionOperand operand() const { return {bits.data(), int64_t{L} * stride(), D, stride()}; }
};

struct Mask {
  int M, W;
  std::vector<uint32_t> words, fragments, key_words;
  std::vector<uint8_t> classes;
  int64_t fragments_batch, classes_batch;

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
    make_fragments(c);
    make_classes(c);
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

  void make_fragments(const Case& c) {
    const int rows = (c.Lq + 63) / 64, columns = (c.Lk + 127) / 128;
    fragments_batch = M > 1 ? int64_t{rows} * columns * 256 : 0;
    fragments.resize(size_t(M) * rows * columns * 256);
    for (size_t at = 0; at < fragments.size() * 32; ++at) {
      const int i = static_cast<int>(at % 64), thread = static_cast<int>(at / 64 % 128), n = i / 4;
      const int tile = static_cast<int>(at / 8192 % (size_t(rows) * columns)),
                m = static_cast<int>(at / 8192) / (rows * columns);
      const int q = tile / columns * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
      const int key = tile % columns * 128 + 8 * n + 2 * (thread % 4) + i % 2;
      fragments[at / 32] |= bit(c, m, q, key) << at % 32;
    }
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

bool agrees(const Case& c) {
  const Operand q(c, c.H, c.Lq, 0, 4.0f), k(c, c.Hkv, c.Lk, 1u << 28, 1.0f), v(c, c.Hkv, c.Lk, 2u << 28, 0.25f);
  const Mask mask(c);
  std::vector<uint16_t> out(size_t(c.B) * c.H * c.Lq * c.D, 0x7fff);
  std::vector<float> lse(size_t(c.B) * c.H * c.Lq, 7.0f);
  AttentionParams p{q.operand(), k.operand(), v.operand(), {},    c.B,        c.H,
                    c.Hkv,       c.Lq,        c.Lk,        0.25f, out.data(), lse.data()};
  if (c.bits) p.mask.words = mask.words.data();
  if (c.bits && mask.M > 1) p.mask.words_batch = int64_t{c.Lq} * mask.W;
  if (c.bits && c.classes) p.mask.classes = mask.classes.data(), p.mask.classes_batch = mask.classes_batch;
  if (c.padding) p.mask.key_words = mask.key_words.data();
  p.mask.causal = c.causal;
  const MaskFragments fragments{c.bits ? mask.fragments.data() : nullptr, mask.fragments_batch};
  const bool uneven = !c.causal && (c.classes || c.padding);
  int taken = 0;
  const cudaError_t error = launch_attention_hopper(p, fragments, uneven ? &taken : nullptr, c.D, c.is_half, nullptr);
  if (error != cudaSuccess) {
    std::puts(cudaGetErrorString(error));
    return false;
  }
  const double tolerance = c.is_half ? 0x1p-10 : 0x1p-7;
  std::vector<double> weight(c.Lk), value(c.D);
  for (int row = 0; row < c.B * c.H * c.Lq; ++row) {
    const int b = row / c.Lq / c.H, h = row / c.Lq % c.H, i = row % c.Lq, kv_head = h / (c.H / c.Hkv);
    double sum = 0.0;
    value.assign(c.D, 0.0);
    for (int j = 0; j < c.Lk; ++j) {
      double score = 0.0;
      for (int d = 0; d < c.D; ++d) score += q.row(b, h, i)[d] * k.row(b, kv_head, j)[d];
      weight[j] = mask.allows(c, b, i, j) ? std::exp(0.25 * score) : 0.0;
      sum += weight[j];
      for (int d = 0; d < c.D; ++d) value[d] += weight[j] * v.row(b, kv_head, j)[d];
    }
    const double lse_error = sum == 0.0 ? (lse[row] == -INFINITY ? 0.0 : INFINITY) : std::abs(lse[row] - std::log(sum));
    double error_of_row = lse_error > 1e-4 * (1.0 + std::abs(std::log(sum))) || std::isnan(lse[row]) ? 1.0 : 0.0;
    for (int d = 0; d < c.D; ++d) {
      const uint16_t bits = out[size_t(row) * c.D + d];
      const double got = c.is_half ? simulator::float_of_half(bits) : simulator::float_of_bfloat16(bits);
      const double wanted = sum == 0.0 ? 0.0 : value[d] / sum;
      if (!(std::abs(got - wanted) <= error_of_row)) error_of_row = std::isnan(got) ? 1.0 : std::abs(got - wanted);
    }
    if (error_of_row > tolerance) {
      std::printf("differs: case %d, b %d, h %d, query %d: %g, lse %g, not %g\n", static_cast<int>(&c - kCases), b, h,
                  i, error_of_row, static_cast<double>(lse[row]), std::log(sum));
      return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace diffullama

// Numbers of cases, or none for all.
int main(int argc, char** argv) {
  using namespace diffullama;
  std::vector<int> cases;
  for (int i = 1; i < argc; ++i) cases.push_back(std::atoi(argv[i]));
  for (size_t i = 0; argc < 2 && i < sizeof kCases / sizeof *kCases; ++i) cases.push_back(static_cast<int>(i));
  for (const int i : cases) {
    if (!agrees(kCases[i])) return 1;
  }
  std::puts("agrees");
  return 0;
}
