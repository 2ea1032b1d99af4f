// SPDX-License-Identifier: Apache-2.0
// attention_hopper on CUDA: check, guard, lay out, allocate, launch.
#include "attention_hopper_kernel.h"

#include "attention_hopper_plan.h"
#include "attention_host.h"

namespace diffullama {
namespace {

void check_hopper_width(const AttentionInputs& in) {
  check(is_hopper_attention_width(in.q.size(3)), "the head size must be 64 or 128, got ", in.q.size(3));
}

// Of the mask [rows, columns] or its transpose.
void check_fragments(const char* name, const AttentionInputs& in, const std::optional<Tensor>& fragments, int64_t rows,
                     int64_t columns) {
  check(in.words.has_value() == fragments.has_value(), "words and ", name, " come together");
  if (!fragments) return;
  check_tensor(name, *fragments, ScalarType::Int,
               {in.words->size(0), ceil_div(rows, 64), ceil_div(columns, kHopperColumns), 128, 2}, &in.q);
}

// `fragments` is contiguous.
MaskFragments mask_fragments(const std::optional<Tensor>& fragments) {
  if (!fragments) return {};
  return {reinterpret_cast<const uint32_t*>(fragments->const_data_ptr<int32_t>()),
          fragments->size(0) > 1 ? fragments->numel() / fragments->size(0) : 0};
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
                                                 bool causal, double scale, bool, std::optional<Tensor>) {
  const AttentionInputs in{q, k, v, words, tile_classes, key_padding, causal, scale};
  check_attention(in);
  check_hopper_width(in);
  check_fragments("fragments", in, fragments, q.size(2), k.size(2));
  const DeviceGuard guard(q.get_device_index());
  if (is_empty(in)) return empty_attention(in);
  const cudaStream_t stream = current_stream(q);
  const AttentionForward made(in, as_map_operand, stream);
  const std::optional<Tensor> fragments_c = as_contiguous(fragments);
  // Tile classes and padding leave some queries less work than others.
  std::optional<Tensor> taken;
  if (!causal && (tile_classes || key_padding)) taken = zeros_like_device(q, {1}, ScalarType::Int);
  int* const counter = taken ? taken->mutable_data_ptr<int32_t>() : nullptr;
  check_launch("attention_hopper_forward_kernel", launch_attention_hopper(made.params, mask_fragments(fragments_c),
                                                                          counter, width(in), is_half(q), stream));
  return {made.out, made.lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_hopper_backward_cuda(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    std::optional<Tensor> words, std::optional<Tensor> transposed_fragments, std::optional<Tensor> tile_classes,
    std::optional<Tensor> key_padding, bool causal, double scale, bool deterministic) {
  const AttentionInputs in{q, k, v, words, tile_classes, key_padding, causal, scale};
  check_attention_backward(in, dout, out, lse);
  check_hopper_width(in);
  check_fragments("transposed_fragments", in, transposed_fragments, k.size(2), q.size(2));
  const DeviceGuard guard(q.get_device_index());
  if (is_empty(in)) return empty_attention_backward(in);
  const cudaStream_t stream = current_stream(q);
  const AttentionSizes s = sizes_of(in);
  const int D = width(in);
  const AttentionBackward made(in, dout, out, lse, hopper_backward_queries(s), as_map_operand, stream);
  const std::optional<Tensor> fragments = as_contiguous(transposed_fragments);
  Tensor counters = zeros_like_device(q, {hopper_backward_counters(s)}, ScalarType::Int);
  const HopperBackwardBuffers buffers{mask_fragments(fragments), counters.mutable_data_ptr<int32_t>(), deterministic};
  const AttentionBackwardParams& p = made.params;
  check_launch("attention_query_statistics_kernel", launch_query_statistics(p, D, is_half(q), stream));
  check_launch("attention_hopper_backward_kernel", launch_attention_hopper_backward(p, buffers, D, is_half(q), stream));
  check_launch("attention_query_gradient_kernel", launch_query_gradient(p, D, is_half(q), stream));
  return {made.dq, made.dk, made.dv};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("attention_hopper", TORCH_BOX(&diffullama::attention_hopper_cuda));
  m.impl("attention_hopper_backward", TORCH_BOX(&diffullama::attention_hopper_backward_cuda));
}
