// SPDX-License-Identifier: Apache-2.0
// attention on CUDA: check, guard, lay out, allocate, launch.
#include "attention_host.h"

namespace diffullama {
namespace {

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                          std::optional<Tensor> words, std::optional<Tensor> tile_classes,
                                          std::optional<Tensor> key_padding, bool causal, double scale, bool) {
  const AttentionInputs in{q, k, v, words, tile_classes, key_padding, causal, scale};
  check_attention(in);
  const DeviceGuard guard(q.get_device_index());
  if (is_empty(in)) return empty_attention(in);
  const cudaStream_t stream = current_stream(q);
  const AttentionForward made(in, as_operand, stream);
  check_launch("attention_forward_kernel", launch_attention(made.params, width(in), is_half(q), stream));
  return {made.out, made.lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cuda(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                           const Tensor& v, const Tensor& out, const Tensor& lse,
                                                           std::optional<Tensor> words,
                                                           std::optional<Tensor> tile_classes,
                                                           std::optional<Tensor> key_padding, bool causal, double scale,
                                                           bool deterministic) {
  const AttentionInputs in{q, k, v, words, tile_classes, key_padding, causal, scale};
  check_attention_backward(in, dout, out, lse);
  const DeviceGuard guard(q.get_device_index());
  if (is_empty(in)) return empty_attention_backward(in);
  const cudaStream_t stream = current_stream(q);
  const int D = width(in);
  AttentionBackward made(in, dout, out, lse, q.size(2), as_operand, stream);
  std::optional<Tensor> turns;
  if (deterministic) {
    turns = zeros_like_device(q, {query_turns_size(sizes_of(in), key_gradient_tile(D).columns)}, ScalarType::Int);
    made.params.turns = turns->mutable_data_ptr<int32_t>();
  }
  const AttentionBackwardParams& p = made.params;
  check_launch("attention_query_statistics_kernel", launch_query_statistics(p, D, is_half(q), stream));
  check_launch("attention_key_gradient_kernel", launch_key_gradient(p, D, is_half(q), stream));
  check_launch("attention_query_gradient_kernel", launch_query_gradient(p, D, is_half(q), stream));
  return {made.dq, made.dk, made.dv};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("attention", TORCH_BOX(&diffullama::attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&diffullama::attention_backward_cuda));
}
