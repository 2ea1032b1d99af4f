// SPDX-License-Identifier: Apache-2.0
// shifted_cross_entropy and its backward on CUDA: check, guard, contiguous, allocate, launch.
#include "loss_cuda.h"

#include "../common/dispatch.h"

namespace diffullama {
namespace {

std::tuple<Tensor, Tensor> shifted_cross_entropy_cuda(const Tensor& logits, const Tensor& x0, const Tensor& masked,
                                                      bool shift, double label_smoothing, double softcap) {
  const LossOptions options{shift, label_smoothing, softcap};
  check_targets("logits", logits, x0, masked, options);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor logits_c = as_contiguous(logits), x0_c = as_contiguous(x0), masked_c = as_contiguous(masked);
  const int64_t B = logits.size(0), L = logits.size(1);
  const ScalarType wide = wide_dtype(logits.scalar_type());
  Tensor nll = empty_like_device(logits, {B, L}, wide), lse = empty_like_device(logits, {B, L}, wide);
  if (B * L == 0) return {nll, lse};
  LogitsParams p{};
  p.targets = targets_of(x0_c, masked_c, logits.size(2), options);
  p.logits = logits_c.const_data_ptr();
  p.nll = nll.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  check_launch("logits_nll_kernel", launch_logits_forward(p, element_of(logits.scalar_type()), current_stream(logits)));
  return {nll, lse};
}

Tensor shifted_cross_entropy_backward_cuda(const Tensor& dnll, const Tensor& logits, const Tensor& lse,
                                           const Tensor& x0, const Tensor& masked, bool shift, double label_smoothing,
                                           double softcap) {
  const LossOptions options{shift, label_smoothing, softcap};
  check_targets("logits", logits, x0, masked, options);
  const int64_t B = logits.size(0), L = logits.size(1), V = logits.size(2);
  const ScalarType wide = wide_dtype(logits.scalar_type());
  check_tensor("dnll", dnll, wide, {B, L}, &logits);
  check_tensor("lse", lse, wide, {B, L}, &logits);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor logits_c = as_contiguous(logits), x0_c = as_contiguous(x0), masked_c = as_contiguous(masked);
  const Tensor dnll_c = as_contiguous(dnll), lse_c = as_contiguous(lse);
  Tensor dlogits = empty_like_device(logits, {B, L, V}, logits.scalar_type());
  if (B * L == 0) return dlogits;
  LogitsParams p{};
  p.targets = targets_of(x0_c, masked_c, V, options);
  p.logits = logits_c.const_data_ptr();
  p.lse = const_cast<void*>(lse_c.const_data_ptr());  // only read here
  p.dnll = dnll_c.const_data_ptr();
  p.dlogits = dlogits.mutable_data_ptr();
  check_launch("logits_gradient_kernel",
               launch_logits_backward(p, element_of(logits.scalar_type()), current_stream(logits)));
  return dlogits;
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("shifted_cross_entropy", TORCH_BOX(&diffullama::shifted_cross_entropy_cuda));
  m.impl("shifted_cross_entropy_backward", TORCH_BOX(&diffullama::shifted_cross_entropy_backward_cuda));
}
