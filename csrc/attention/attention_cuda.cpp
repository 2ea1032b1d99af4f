// SPDX-License-Identifier: Apache-2.0
// attention on CUDA: check, guard, lay out, allocate, launch.
#include "attention.h"

#include <limits>

#include "../attention_mask/attention_mask_kernel.h"
#include "../common/cuda_host.h"
#include "attention_kernel.h"

namespace diffullama {
namespace {

// As the kernels read it: unit stride in D, rows of whole 16 bytes at aligned addresses. Copied where it is not so.
Tensor as_operand(const Tensor& t) {
  bool fits = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) fits = fits && (t.size(d) == 1 || t.stride(d) % 8 == 0);
  return fits ? t : as_contiguous(t);
}

AttentionOperand operand(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The tensors that the kernels' mask points into.
struct MaskTensors {
  std::optional<Tensor> words, classes, key_words;

  MaskTensors(const AttentionInputs& in, cudaStream_t stream)
      : words(as_contiguous(in.words)), classes(as_contiguous(in.tile_classes)) {
    if (!in.key_padding) return;
    const Tensor padding = as_contiguous(*in.key_padding);
    const int64_t B = padding.size(0), Lk = padding.size(1);
    key_words = empty_like_device(padding, {B, ceil_div(Lk, 32)}, ScalarType::Int);
    const PackMaskParams p{const_bytes(padding), reinterpret_cast<uint32_t*>(key_words->mutable_data_ptr<int32_t>()), 1,
                           B, Lk};
    check_launch("pack_mask_kernel", launch_pack_mask(p, stream));
  }

  AttentionMaskParams params(bool causal) const {
    const auto words_of = [](const std::optional<Tensor>& t) {
      return t ? reinterpret_cast<const uint32_t*>(t->const_data_ptr<int32_t>()) : nullptr;
    };
    AttentionMaskParams p{};
    p.words = words_of(words);
    p.key_words = words_of(key_words);
    p.classes = classes ? classes->const_data_ptr<uint8_t>() : nullptr;
    p.words_batch = words && words->size(0) > 1 ? words->size(1) * words->size(2) : 0;
    p.classes_batch = classes && classes->size(0) > 1 ? classes->size(1) * classes->size(2) : 0;
    p.causal = causal;
    return p;
  }
};

AttentionSizes sizes_of(const AttentionInputs& in) {
  return {in.q.size(0), in.q.size(1), in.k.size(1), in.q.size(2), in.k.size(2), in.q.size(3)};
}

template <class Params>
void set_inputs(Params& p, const AttentionSizes& s, const AttentionInputs& in, const MaskTensors& mask) {
  for (const int64_t grid : {forward_grid(s), query_gradient_grid(s), key_gradient_grid(s), s.B * s.H}) {
    check(grid <= std::numeric_limits<int32_t>::max(), "too many heads and queries for a launch: ", grid, " blocks");
  }
  p.mask = mask.params(in.causal);
  p.B = static_cast<int>(s.B);
  p.H = static_cast<int>(s.H);
  p.Hkv = static_cast<int>(s.Hkv);
  p.Lq = static_cast<int>(s.Lq);
  p.Lk = static_cast<int>(s.Lk);
  p.scale = static_cast<float>(in.scale);
}

bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::Half; }

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                          std::optional<Tensor> words, std::optional<Tensor> tile_classes,
                                          std::optional<Tensor> key_padding, bool causal, double scale) {
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
                                                           std::optional<Tensor> key_padding, bool causal,
                                                           double scale) {
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
  AttentionBackwardParams p{};
  set_inputs(p, s, in, mask);
  p.q = operand(q_rows);
  p.k = operand(k_rows);
  p.v = operand(v_rows);
  p.dout = operand(dout_rows);
  p.out = out_c.const_data_ptr();
  p.lse = lse_c.const_data_ptr<float>();
  p.statistics = reinterpret_cast<QueryStatistics*>(statistics.mutable_data_ptr<float>());
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr();
  const int D = static_cast<int>(s.D);
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
