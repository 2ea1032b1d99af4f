// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../common/tensor.h"
#include "attention_plan.h"

namespace diffullama {

struct AttentionInputs {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&words, &tile_classes, &key_padding;
  bool causal;
  double scale;
};

constexpr int64_t kMaxAttentionLength = int64_t{1} << 30;  // positions and their tiles are 32-bit

inline void check_attention(const AttentionInputs& in) {
  const ScalarType dtype = in.q.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "q must be float16 or bfloat16");
  check_tensor("q", in.q, dtype, {kAny, kAny, kAny, kAny});
  const int64_t B = in.q.size(0), H = in.q.size(1), Lq = in.q.size(2), D = in.q.size(3);
  check_tensor("k", in.k, dtype, {B, kAny, kAny, D}, &in.q);
  const int64_t Hkv = in.k.size(1), Lk = in.k.size(2);
  check_tensor("v", in.v, dtype, {B, Hkv, Lk, D}, &in.q);
  check(is_attention_width(D), "the head size must be 32, 64, 96, 128 or 256, got ", D);
  check(Hkv > 0 && H % Hkv == 0, "q must have a multiple of k's ", Hkv, " heads, got ", H);
  check(Lq < kMaxAttentionLength && Lk < kMaxAttentionLength, "lengths must be below 2^30, got ", Lq, " and ", Lk);
  check(in.scale >= 0, "scale must be at least 0, got ", in.scale);
  if (in.words) {
    const int64_t M = in.words->size(0);
    check_tensor("words", *in.words, ScalarType::Int, {kAny, Lq, ceil_div(Lk, 32)}, &in.q);
    check(M == 1 || M == B, "words must hold 1 or ", B, " masks, got ", M);
    check(!in.causal, "words and causal exclude each other");
    if (in.tile_classes) {
      check_tensor("tile_classes", *in.tile_classes, ScalarType::Byte,
                   {M, ceil_div(Lq, kClassTile), ceil_div(Lk, kClassTile)}, &in.q);
    }
  }
  check(in.words || !in.tile_classes, "tile_classes come with words");
  if (in.key_padding) check_tensor("key_padding", *in.key_padding, ScalarType::Bool, {B, Lk}, &in.q);
}

// What the backward takes besides.
inline void check_attention_backward(const AttentionInputs& in, const Tensor& dout, const Tensor& out,
                                     const Tensor& lse) {
  check_attention(in);
  const int64_t B = in.q.size(0), H = in.q.size(1), Lq = in.q.size(2), D = in.q.size(3);
  check_tensor("dout", dout, in.q.scalar_type(), {B, H, Lq, D}, &in.q);
  check_tensor("out", out, in.q.scalar_type(), {B, H, Lq, D}, &in.q);
  check_tensor("lse", lse, ScalarType::Float, {B, H, Lq}, &in.q);
}

}  // namespace diffullama
