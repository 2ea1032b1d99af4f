// SPDX-License-Identifier: Apache-2.0
// attention_hopper_forward_kernel against a loop on the host in double, without torch: tests break the kernel and look
// whether it still agrees. Prints "agrees", the first difference, or the launch's error.
#include "attention_hopper_case.h"

namespace diffullama {
namespace {

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

bool agrees(const Case& c, int number) {
  const Operand q(c, c.H, c.Lq, 0, 4.0f), k(c, c.Hkv, c.Lk, 1u << 28, 1.0f), v(c, c.Hkv, c.Lk, 2u << 28, 0.25f);
  const Mask mask(c);
  std::vector<uint16_t> out(size_t(c.B) * c.H * c.Lq * c.D, 0x7fff);
  std::vector<float> lse(size_t(c.B) * c.H * c.Lq, 7.0f);
  AttentionParams p{q.operand(), k.operand(), v.operand(), {},    c.B,        c.H,
                    c.Hkv,       c.Lq,        c.Lk,        0.25f, out.data(), lse.data()};
  p.mask = mask.params(c);
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
      const double got = value_of(c, bits);
      const double wanted = sum == 0.0 ? 0.0 : value[d] / sum;
      if (!(std::abs(got - wanted) <= error_of_row)) error_of_row = std::isnan(got) ? 1.0 : std::abs(got - wanted);
    }
    if (error_of_row > tolerance) {
      std::printf("differs: case %d, b %d, h %d, query %d: %g, lse %g, not %g\n", number, b, h, i, error_of_row,
                  static_cast<double>(lse[row]), std::log(sum));
      return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace diffullama

int main(int argc, char** argv) { return diffullama::run_cases(diffullama::kCases, diffullama::agrees, argc, argv); }
