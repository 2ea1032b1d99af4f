// SPDX-License-Identifier: Apache-2.0
// mask_tokens on CUDA: check, guard, contiguous, allocate, launch.
#include "../common/cuda_host.h"
#include "noising.h"
#include "noising_kernel.h"

namespace diffullama {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_tokens_cuda(const Tensor& x0, const Tensor& p_mask,
                                                            std::optional<Tensor> maskable, const Tensor& seed,
                                                            const Tensor& sample_index, int64_t mask_id) {
  check_mask_tokens(x0, p_mask, maskable, seed, sample_index, mask_id);
  const DeviceGuard guard(x0.get_device_index());
  const Tensor x0_c = as_contiguous(x0), p_c = as_contiguous(p_mask);
  const Tensor index_c = as_contiguous(sample_index);
  const std::optional<Tensor> maskable_c = as_contiguous(maskable);
  const int64_t B = x0.size(0), L = x0.size(1);
  Tensor xt = empty_like_device(x0, {B, L}, ScalarType::Long), masked = empty_like_device(x0, {B, L}, ScalarType::Bool);
  Tensor positions = empty_like_device(x0, {B * L}, ScalarType::Long);
  if (B * L == 0) return {xt, masked, positions, zeros_like_device(x0, {B}, ScalarType::Long)};
  Tensor counts = empty_like_device(x0, {B}, ScalarType::Long);
  Tensor block_counts = empty_like_device(x0, {kMaskTokensMaxBlocks}, ScalarType::Long);
  MaskTokensParams p{};
  p.x0 = x0_c.const_data_ptr<int64_t>();
  p.p_mask = p_c.const_data_ptr<float>();
  p.maskable = maskable_c ? maskable_c->const_data_ptr<bool>() : nullptr;
  p.seed = seed.const_data_ptr<int64_t>();
  p.sample_index = index_c.const_data_ptr<int64_t>();
  p.xt = xt.mutable_data_ptr<int64_t>();
  p.masked = masked.mutable_data_ptr<bool>();
  p.positions = positions.mutable_data_ptr<int64_t>();
  p.counts = counts.mutable_data_ptr<int64_t>();
  p.block_counts = block_counts.mutable_data_ptr<int64_t>();
  p.B = B;
  p.L = L;
  p.mask_id = mask_id;
  p.p_by_token = p_mask.dim() == 2;
  check_launch("mask_tokens_kernel", launch_mask_tokens(p, current_stream(x0)));
  return {xt, masked, positions, counts};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("mask_tokens", TORCH_BOX(&diffullama::mask_tokens_cuda));
}
