// SPDX-License-Identifier: Apache-2.0
// token_stats on CUDA: check, guard, contiguous, allocate, launch. Double logits are rounded to float first.
#include "../common/cuda_host.h"
#include "token_stats_kernel.h"
#include "unmasking.h"

namespace diffullama {
namespace {

LogitFormat format_of(ScalarType dtype) {
  return dtype == ScalarType::Half       ? LogitFormat::kHalf
         : dtype == ScalarType::BFloat16 ? LogitFormat::kBFloat16
                                         : LogitFormat::kFloat;
}

Draw draw_of(const DrawOptions& options, int64_t V) {
  if (options.temperature == 0) return Draw::kGreedy;
  const bool truncated = (options.top_k > 0 && options.top_k < V) || options.top_p < 1;
  return truncated ? Draw::kTruncated : Draw::kWhole;
}

// Rows may lie apart, as in a slice of padded logits.
Tensor as_rows(const Tensor& logits) {
  const Tensor x = logits.scalar_type() == ScalarType::Double ? torch::stable::to(logits, ScalarType::Float) : logits;
  return x.size(1) == 1 || x.stride(1) == 1 ? x : as_contiguous(x);
}

std::tuple<Tensor, Tensor> token_stats_cuda(const Tensor& logits, std::optional<Tensor> current,
                                            const Tensor& row_index, const Tensor& seed, const Tensor& step,
                                            double temperature, int64_t top_k, double top_p, int64_t forbid) {
  const DrawOptions options{temperature, top_k, top_p, forbid};
  check_token_stats(logits, current, row_index, seed, step, options);
  const DeviceGuard guard(logits.get_device_index());
  const int64_t N = logits.size(0), V = logits.size(1);
  const Tensor x = as_rows(logits), index_c = as_contiguous(row_index);
  const std::optional<Tensor> current_c = as_contiguous(current);
  Tensor token = empty_like_device(logits, {N}, ScalarType::Long),
         values = empty_like_device(logits, {8, N}, ScalarType::Float);
  if (N == 0) return {token, values};
  TokenStatsParams p{};
  p.logits = x.const_data_ptr();
  p.current = current_c ? current_c->const_data_ptr<int64_t>() : nullptr;
  p.row_index = index_c.const_data_ptr<int64_t>();
  p.seed = seed.const_data_ptr<int64_t>();
  p.step = step.const_data_ptr<int64_t>();
  p.token = token.mutable_data_ptr<int64_t>();
  p.values = values.mutable_data_ptr<float>();
  p.N = N;
  p.row_stride = x.stride(0);
  p.top_k = top_k;
  p.top_p = top_p;
  p.temperature = static_cast<float>(temperature);
  p.V = static_cast<int>(V);
  p.forbid = static_cast<int>(forbid < 0 ? -1 : forbid);
  check_launch("token_stats_kernel",
               launch_token_stats(p, format_of(x.scalar_type()), draw_of(options, V), current_stream(logits)));
  return {token, values};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("token_stats", TORCH_BOX(&diffullama::token_stats_cuda));
}
