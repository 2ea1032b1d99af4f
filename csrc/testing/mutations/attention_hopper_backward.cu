// SPDX-License-Identifier: Apache-2.0
// attention_hopper_backward_kernel against loops on the host in double, as attention_hopper.cu: from statistics that
// are made here, and with dQ read from its sums.
#include "../../attention/attention_hopper_plan.h"
#include "attention_hopper_case.h"

namespace diffullama {
namespace {

// Tiles are 64 or 128 queries by 128 keys: one, several, more than the ring has, and parts of them.
const Case kCases[] = {
    {1, 1, 1, 1, 1, 128, true, false, false, false, false, false},
    {1, 2, 1, 330, 300, 128, true, false, false, false, false, false},
    {2, 2, 1, 200, 130, 128, true, true, false, false, false, false},
    {2, 2, 2, 200, 257, 128, false, false, true, true, true, true},
    {1, 1, 1, 65, 140, 128, true, false, true, false, true, false},
    {1, 4, 2, 260, 130, 64, true, false, false, false, false, false},
    {2, 2, 1, 193, 300, 64, false, false, true, true, true, true},
    {2, 3, 1, 300, 129, 64, true, true, false, false, true, false},
};

struct Gradients {
  std::vector<double> dq, dk, dv;

  explicit Gradients(const Case& c)
      : dq(size_t(c.B) * c.H * c.Lq * c.D), dk(size_t(c.B) * c.Hkv * c.Lk * c.D), dv(dk.size()) {}
};

constexpr double kScale = 0.25;

// By the definition; also makes the statistics, a row of whole tiles a head.
Gradients exact(const Case& c, const Operand& q, const Operand& k, const Operand& v, const Operand& dout,
                const Mask& mask, std::vector<QueryStatistics>& statistics, int rows) {
  Gradients g(c);
  std::vector<double> p(c.Lk), dp(c.Lk);
  for (int row = 0; row < c.B * c.H * c.Lq; ++row) {
    const int b = row / c.Lq / c.H, h = row / c.Lq % c.H, i = row % c.Lq, kv_head = h / (c.H / c.Hkv);
    double sum = 0.0, delta = 0.0;
    for (int j = 0; j < c.Lk; ++j) {
      double score = 0.0;
      dp[j] = 0.0;
      for (int d = 0; d < c.D; ++d) {
        score += q.row(b, h, i)[d] * k.row(b, kv_head, j)[d];
        dp[j] += dout.row(b, h, i)[d] * v.row(b, kv_head, j)[d];
      }
      p[j] = mask.allows(c, b, i, j) ? std::exp(kScale * score) : 0.0;
      sum += p[j];
    }
    for (int j = 0; j < c.Lk; ++j) delta += sum == 0.0 ? 0.0 : (p[j] /= sum) * dp[j];
    statistics[(size_t(b) * c.H + h) * rows + i] = {sum == 0.0 ? INFINITY : static_cast<float>(std::log2(sum)),
                                                    static_cast<float>(delta)};
    for (int j = 0; j < c.Lk; ++j) {
      const double ds = kScale * p[j] * (dp[j] - delta);
      const size_t key = (size_t(b * c.Hkv + kv_head) * c.Lk + j) * c.D;
      for (int d = 0; d < c.D; ++d) {
        g.dv[key + d] += p[j] * dout.row(b, h, i)[d];
        g.dk[key + d] += ds * q.row(b, h, i)[d];
        g.dq[size_t(row) * c.D + d] += ds * k.row(b, kv_head, j)[d];
      }
    }
  }
  return g;
}

template <class Got>
bool close(const char* name, int number, const Case& c, const std::vector<double>& wanted, const Got& got) {
  double largest = 0.0, error = 0.0;
  size_t where = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    largest = std::max(largest, std::abs(wanted[i]));
    const double e = std::abs(got(i) - wanted[i]);
    if (!(e <= error)) error = std::isnan(e) ? INFINITY : e, where = i;
  }
  if (error <= (c.is_half ? 0x1p-9 : 0x1p-6) * largest + 1e-6) return true;
  std::printf("differs: case %d, %s, row %zu, column %zu: %g, not %g\n", number, name, where / c.D, where % c.D,
              got(where), wanted[where]);
  return false;
}

bool agrees(const Case& c, int number) {
  const Operand q(c, c.H, c.Lq, 0, 1.0f), k(c, c.Hkv, c.Lk, 1u << 28, 1.0f), v(c, c.Hkv, c.Lk, 2u << 28, 0.25f);
  const Operand dout(c, c.H, c.Lq, 3u << 28, 1.0f);
  const Mask mask(c);
  const AttentionSizes sizes{c.B, c.H, c.Hkv, c.Lq, c.Lk, c.D};
  const auto rows = static_cast<int>(hopper_backward_queries(sizes));
  std::vector<QueryStatistics> statistics(size_t(c.B) * c.H * rows, {INFINITY, 0.0f});
  const Gradients wanted = exact(c, q, k, v, dout, mask, statistics, rows);
  std::vector<float> sums(query_sums_size(sizes));
  std::vector<int> counters(hopper_backward_counters(sizes));
  std::vector<uint16_t> dk(wanted.dk.size(), 0x7fff), dv(dk);
  AttentionBackwardParams p{};
  p.q = q.operand(), p.k = k.operand(), p.v = v.operand(), p.dout = dout.operand();
  p.mask = mask.params(c);
  p.B = c.B, p.H = c.H, p.Hkv = c.Hkv, p.Lq = c.Lq, p.Lk = c.Lk;
  p.scale = static_cast<float>(kScale);
  p.statistics = statistics.data(), p.statistics_rows = rows;
  p.query_sums = sums.data();
  p.dk = dk.data(), p.dv = dv.data();
  const HopperBackwardBuffers buffers{
      {c.bits ? mask.transposed_fragments.data() : nullptr, mask.transposed_batch}, counters.data(), number % 2 == 0};
  const cudaError_t error = launch_attention_hopper_backward(p, buffers, c.D, c.is_half, nullptr);
  if (error != cudaSuccess) {
    std::puts(cudaGetErrorString(error));
    return false;
  }
  // Tiles of 64 queries, columns of 8, bands of 16 queries, lanes, {row, column} of 2 x 2.
  const auto dq_at = [&](size_t at) {
    const size_t d = at % c.D, row = at / c.D % c.Lq, head = at / c.D / c.Lq, n_tiles = (c.Lq + 63) / 64;
    const size_t fragment = ((head * n_tiles + row / 64) * (c.D / 8) + d / 8) * 4 + row % 64 / 16;
    return kScale * sums[fragment * 128 + (row % 8 * 4 + d % 8 / 2) * 4 + row % 16 / 8 * 2 + d % 2];
  };
  return close("dV", number, c, wanted.dv, [&](size_t i) { return value_of(c, dv[i]); }) &&
         close("dK", number, c, wanted.dk, [&](size_t i) { return value_of(c, dk[i]); }) &&
         close("dQ", number, c, wanted.dq, dq_at);
}

}  // namespace
}  // namespace diffullama

int main(int argc, char** argv) { return diffullama::run_cases(diffullama::kCases, diffullama::agrees, argc, argv); }
