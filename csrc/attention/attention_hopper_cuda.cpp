// SPDX-License-Identifier: Apache-2.0
// attention_hopper on CUDA: check, guard, lay out, allocate, launch.
#include "attention_hopper_kernel.h"

#include "attention_hopper_plan.h"
#include "attention_host.h"

namespace diffullama {
namespace {

void check_attention_hopper(const AttentionInputs& in, const std::optional<Tensor>& fragments) {
  check_attention(in);
  check(is_hopper_attention_width(in.q.size(3)), "the head size must be 64 or 128, got ", in.q.size(3));
  check(in.words.has_value() == fragments.has_value(), "words and fragments come together");
  if (!fragments) return;
  check_tensor("fragments", *fragments, ScalarType::Int,
               {in.words->size(0), ceil_div(in.q.size(2), 64), ceil_div(in.k.size(2), kHopperColumns), 128, 2}, &in.q);
}

// As a tensor map takes it: strides of 0 (expanded dimensions) are copied too.
Tensor as_map_operand(const Tensor& t) {
  bool fits = true;
  for (int d = 0; d < 3; ++d) fits = fits && (t.size(d) == 1 || t.stride(d) != 0);
  return as_operand(fits ? t : as_contiguous(t));
}

std::tuple<Tensor, Tensor> attention_hopper_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 std::optional<Tensor> words, std::optional<Tensor> fragments,
                                                 std::optional<Tensor> tile_classes, std::optional<Tensor> key_padding,
                                                 bool causal, double scale) {
  const AttentionInputs in{q, k, v, words, tile_classes, key_padding, causal, scale};
  check_attention_hopper(in, fragments);
  const DeviceGuard guard(q.get_device_index());
  const AttentionSizes s = sizes_of(in);
  if (s.B * s.H * s.Lq * s.Lk == 0) {
    Tensor lse = empty_like_device(q, {s.B, s.H, s.Lq}, ScalarType::Float);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {zeros_like_device(q, {s.B, s.H, s.Lq, s.D}, q.scalar_type()), lse};
  }
  const cudaStream_t stream = current_stream(q);
  const Tensor q_rows = as_map_operand(q), k_rows = as_map_operand(k), v_rows = as_map_operand(v);
  const MaskTensors mask(in, stream);
  const std::optional<Tensor> fragments_c = as_contiguous(fragments);
  MaskFragments mask_fragments{};
  if (fragments_c) {
    mask_fragments.data = reinterpret_cast<const uint32_t*>(fragments_c->const_data_ptr<int32_t>());
    mask_fragments.batch = fragments_c->size(0) > 1 ? fragments_c->numel() / fragments_c->size(0) : 0;
  }
  Tensor out = empty_like_device(q, {s.B, s.H, s.Lq, s.D}, q.scalar_type());
  Tensor lse = empty_like_device(q, {s.B, s.H, s.Lq}, ScalarType::Float);
  AttentionParams p{};
  set_inputs(p, s, in, mask);
  p.q = operand(q_rows);
  p.k = operand(k_rows);
  p.v = operand(v_rows);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  // Tile classes and padding leave some queries less work than others.
  std::optional<Tensor> taken;
  if (!causal && (tile_classes || key_padding)) taken = zeros_like_device(q, {1}, ScalarType::Int);
  int* const counter = taken ? taken->mutable_data_ptr<int32_t>() : nullptr;
  check_launch("attention_hopper_forward_kernel",
               launch_attention_hopper(p, mask_fragments, counter, static_cast<int>(s.D), is_half(q), stream));
  return {out, lse};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("attention_hopper", TORCH_BOX(&diffullama::attention_hopper_cuda));
}
