// SPDX-License-Identifier: Apache-2.0
// What the host side of every attention op on CUDA makes of its arguments.
#pragma once

#include <limits>

#include "../attention_mask/attention_mask_kernel.h"
#include "../common/cuda_host.h"
#include "attention.h"
#include "attention_kernel.h"

namespace diffullama {

// As the kernels read it: unit stride in D, rows of whole 16 bytes at aligned addresses. Copied where it is not so.
inline Tensor as_operand(const Tensor& t) {
  bool fits = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) fits = fits && (t.size(d) == 1 || t.stride(d) % 8 == 0);
  return fits ? t : as_contiguous(t);
}

inline AttentionOperand operand(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// [B, H, L, D] contiguous, for a result in the shape of `like`.
inline Tensor empty_operand(const Tensor& like) {
  return empty_like_device(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
}

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

inline AttentionSizes sizes_of(const AttentionInputs& in) {
  return {in.q.size(0), in.q.size(1), in.k.size(1), in.q.size(2), in.k.size(2), in.q.size(3)};
}

template <class Params>
void set_inputs(Params& p, const AttentionInputs& in, const MaskTensors& mask, const Tensor& q, const Tensor& k,
                const Tensor& v) {
  const AttentionSizes s = sizes_of(in);
  for (const int64_t grid : {forward_grid(s), query_gradient_grid(s), key_gradient_grid(s), s.B * s.H}) {
    check(grid <= std::numeric_limits<int32_t>::max(), "too many heads and queries for a launch: ", grid, " blocks");
  }
  p.q = operand(q);
  p.k = operand(k);
  p.v = operand(v);
  p.mask = mask.params(in.causal);
  p.B = static_cast<int>(s.B);
  p.H = static_cast<int>(s.H);
  p.Hkv = static_cast<int>(s.Hkv);
  p.Lq = static_cast<int>(s.Lq);
  p.Lk = static_cast<int>(s.Lk);
  p.scale = static_cast<float>(in.scale);
}

inline bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::Half; }
inline int width(const AttentionInputs& in) { return static_cast<int>(in.q.size(3)); }

// No query, or no key: outputs of zeros, lse -inf, and no launch.
inline bool is_empty(const AttentionInputs& in) { return in.q.numel() == 0 || in.k.numel() == 0; }

inline std::tuple<Tensor, Tensor> empty_attention(const AttentionInputs& in) {
  const AttentionSizes s = sizes_of(in);
  Tensor lse = empty_like_device(in.q, {s.B, s.H, s.Lq}, ScalarType::Float);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  return {zeros_like_device(in.q, {s.B, s.H, s.Lq, s.D}, in.q.scalar_type()), lse};
}

inline std::tuple<Tensor, Tensor, Tensor> empty_attention_backward(const AttentionInputs& in) {
  const AttentionSizes s = sizes_of(in);
  const auto zeros = [&](int64_t heads, int64_t length) {
    return zeros_like_device(in.q, {s.B, heads, length, s.D}, in.q.scalar_type());
  };
  return {zeros(s.H, s.Lq), zeros(s.Hkv, s.Lk), zeros(s.Hkv, s.Lk)};
}

// A way to lay out an operand for the kernels.
using LayOut = Tensor (*)(const Tensor&);

// The tensors of a forward, and the parameters that point into them.
struct AttentionForward {
  Tensor q, k, v;
  MaskTensors mask;
  Tensor out, lse;
  AttentionParams params{};

  AttentionForward(const AttentionInputs& in, LayOut lay_out, cudaStream_t stream)
      : q(lay_out(in.q)),
        k(lay_out(in.k)),
        v(lay_out(in.v)),
        mask(in, stream),
        out(empty_operand(in.q)),
        lse(empty_like_device(in.q, {in.q.size(0), in.q.size(1), in.q.size(2)}, ScalarType::Float)) {
    set_inputs(params, in, mask, q, k, v);
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr<float>();
  }
};

// The same of a backward, with the scratch that every kernel of it shares.
struct AttentionBackward {
  Tensor q, k, v, dout, out, lse;
  MaskTensors mask;
  Tensor dq, dk, dv;
  Tensor statistics, query_sums;
  AttentionBackwardParams params{};

  // statistics_rows: Lq or more.
  AttentionBackward(const AttentionInputs& in, const Tensor& dout_in, const Tensor& out_in, const Tensor& lse_in,
                    int64_t statistics_rows, LayOut lay_out, cudaStream_t stream)
      : q(lay_out(in.q)),
        k(lay_out(in.k)),
        v(lay_out(in.v)),
        dout(lay_out(dout_in)),
        out(as_contiguous(out_in)),
        lse(as_contiguous(lse_in)),
        mask(in, stream),
        dq(empty_operand(in.q)),
        dk(empty_operand(in.k)),
        dv(empty_operand(in.v)),
        statistics(empty_like_device(in.q, {in.q.size(0), in.q.size(1), statistics_rows, 2}, ScalarType::Float)),
        query_sums(zeros_like_device(in.q, {query_sums_size(sizes_of(in))}, ScalarType::Float)) {
    set_inputs(params, in, mask, q, k, v);
    params.dout = operand(dout);
    params.out = out.const_data_ptr();
    params.lse = lse.const_data_ptr<float>();
    params.statistics = reinterpret_cast<QueryStatistics*>(statistics.mutable_data_ptr<float>());
    params.statistics_rows = static_cast<int>(statistics_rows);
    params.query_sums = query_sums.mutable_data_ptr<float>();
    params.dq = dq.mutable_data_ptr();
    params.dk = dk.mutable_data_ptr();
    params.dv = dv.mutable_data_ptr();
  }
};

}  // namespace diffullama
