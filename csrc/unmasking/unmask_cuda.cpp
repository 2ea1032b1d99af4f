// SPDX-License-Identifier: Apache-2.0
// unmask on CUDA: check, guard, contiguous, allocate, launch.
#include "../common/cuda_host.h"
#include "unmask_kernel.h"
#include "unmask_plan.h"
#include "unmasking.h"

namespace diffullama {
namespace {

std::tuple<Tensor, Tensor, Tensor> unmask_cuda(const Tensor& xt, const Tensor& masked, const Tensor& token,
                                               const Tensor& confidence, const Tensor& amount, const Tensor& seed,
                                               const Tensor& step, const Tensor& sample_index, std::string rule) {
  check_unmask(xt, masked, token, confidence, amount, seed, step, sample_index);
  const int64_t B = xt.size(0), L = xt.size(1);
  check(L <= kUnmaskMaxLength, "xt must have at most ", kUnmaskMaxLength, " columns, got ", L);
  const DeviceGuard guard(xt.get_device_index());
  const Tensor xt_c = as_contiguous(xt), masked_c = as_contiguous(masked), token_c = as_contiguous(token);
  const Tensor confidence_c = as_contiguous(confidence), amount_c = as_contiguous(amount);
  const Tensor index_c = as_contiguous(sample_index);
  UnmaskParams p{};
  p.rule = parse_rule(rule);
  Tensor xt_out = empty_like_device(xt, {B, L}, ScalarType::Long);
  Tensor committed = empty_like_device(xt, {B, L}, ScalarType::Bool);
  if (B * L == 0) return {xt_out, committed, zeros_like_device(xt, {B}, ScalarType::Long)};
  Tensor remaining = empty_like_device(xt, {B}, ScalarType::Long);
  p.xt = xt_c.const_data_ptr<int64_t>();
  p.masked = masked_c.const_data_ptr<bool>();
  p.token = token_c.const_data_ptr<int64_t>();
  p.confidence = confidence_c.const_data_ptr<float>();
  p.amount = amount_c.const_data_ptr<float>();
  p.seed = seed.const_data_ptr<int64_t>();
  p.step = step.const_data_ptr<int64_t>();
  p.sample_index = index_c.const_data_ptr<int64_t>();
  p.xt_out = xt_out.mutable_data_ptr<int64_t>();
  p.committed = committed.mutable_data_ptr<bool>();
  p.remaining = remaining.mutable_data_ptr<int64_t>();
  p.B = B;
  p.L = L;
  check_launch("unmask_kernel", launch_unmask(p, current_stream(xt)));
  return {xt_out, committed, remaining};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) { m.impl("unmask", TORCH_BOX(&diffullama::unmask_cuda)); }
