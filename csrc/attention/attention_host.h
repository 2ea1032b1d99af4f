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

inline bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::Half; }

}  // namespace diffullama
