// SPDX-License-Identifier: Apache-2.0
// attention on CUDA: check, guard, lay out, allocate, launch.
#include "attention.h"

#include <limits>

#include "attention_host.h"

namespace diffullama {
namespace {

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                          std::optional<Tensor> words, std::optional<Tensor> tile_classes,
                                          std::optional<Tensor> key_padding, bool causal, double scale, bool) {
  const AttentionInputs in{q, k, v, words, tile_classes, key_padding, causal, scale};
  check_attention(in);
  const DeviceGuard guard(q.get_device_index());
  const AttentionSizes s = sizes_of(in);
  if (s.B * s.H * s.Lq * s.Lk == 0) {
    Tensor lse = empty_like_device(q, {s.B, s.H, s.Lq}, ScalarType::Float);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {zeros_like_device(q, {s.B, s.H, s.Lq, s.D}, q.scalar_type()), lse};
  }
  const cudaStream_t stream = current_stream(q);
  const Tensor q_rows = as_operand(q), k_rows = as_operand(k), v_rows = as_operand(v);
  const MaskTensors mask(in, stream);
  Tensor out = empty_like_device(q, {s.B, s.H, s.Lq, s.D}, q.scalar_type());
  Tensor lse = empty_like_device(q, {s.B, s.H, s.Lq}, ScalarType::Float);
  AttentionParams p{};
  set_inputs(p, s, in, mask);
  p.q = operand(q_rows);
  p.k = operand(k_rows);
  p.v = operand(v_rows);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  check_launch("attention_forward_kernel", launch_attention(p, static_cast<int>(s.D), is_half(q), stream));
  return {out, lse};
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
  const AttentionSizes s = sizes_of(in);
  const std::vector<int64_t> q_shape{s.B, s.H, s.Lq, s.D}, k_shape{s.B, s.Hkv, s.Lk, s.D};
  if (s.B * s.H * s.Lq * s.Lk == 0) {
    const auto zeros = [&](const std::vector<int64_t>& shape) { return zeros_like_device(q, shape, q.scalar_type()); };
    return {zeros(q_shape), zeros(k_shape), zeros(k_shape)};
  }
  const cudaStream_t stream = current_stream(q);
  const Tensor q_rows = as_operand(q), k_rows = as_operand(k), v_rows = as_operand(v), dout_rows = as_operand(dout);
  const Tensor out_c = as_contiguous(out), lse_c = as_contiguous(lse);
  const MaskTensors mask(in, stream);
  const auto empty = [&](const std::vector<int64_t>& shape) { return empty_like_device(q, shape, q.scalar_type()); };
  Tensor dq = empty(q_shape), dk = empty(k_shape), dv = empty(k_shape);
  Tensor statistics = empty_like_device(q, {s.B, s.H, s.Lq, 2}, ScalarType::Float);
  const int D = static_cast<int>(s.D);
  Tensor query_sums = zeros_like_device(q, {query_sums_size(s)}, ScalarType::Float);
  std::optional<Tensor> turns;
  if (deterministic) turns = zeros_like_device(q, {query_turns_size(s, key_gradient_tile(D).columns)}, ScalarType::Int);
  AttentionBackwardParams p{};
  set_inputs(p, s, in, mask);
  p.q = operand(q_rows);
  p.k = operand(k_rows);
  p.v = operand(v_rows);
  p.dout = operand(dout_rows);
  p.out = out_c.const_data_ptr();
  p.lse = lse_c.const_data_ptr<float>();
  p.statistics = reinterpret_cast<QueryStatistics*>(statistics.mutable_data_ptr<float>());
  p.statistics_rows = p.Lq;
  p.query_sums = query_sums.mutable_data_ptr<float>();
  p.turns = turns ? turns->mutable_data_ptr<int32_t>() : nullptr;
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr();
  check_launch("attention_query_statistics_kernel", launch_query_statistics(p, D, is_half(q), stream));
  check_launch("attention_key_gradient_kernel", launch_key_gradient(p, D, is_half(q), stream));
  check_launch("attention_query_gradient_kernel", launch_query_gradient(p, D, is_half(q), stream));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("attention", TORCH_BOX(&diffullama::attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&diffullama::attention_backward_cuda));
}
