// SPDX-License-Identifier: Apache-2.0
// Every schema: the native API on one page. Values that change each step (seed, step, p_mask, attn_mask_ratio, amount)
// are tensors: they neither recompile a graph nor stale a captured one. Shapes: B batch, L length, V vocabulary, H
// hidden.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(diffullama, m) {
  // --- noising: q(xt | x0) -> xt [B, L], masked [B, L], positions [B * L], counts [B]
  m.def(
      "mask_tokens(Tensor x0, Tensor p_mask, Tensor? maskable, Tensor seed, Tensor sample_index, int mask_id)"
      " -> (Tensor xt, Tensor masked, Tensor positions, Tensor counts)");

  // --- attention masks as int32 words [M, Lq, ceil(Lk / 32)]
  m.def("pack_mask(Tensor allowed) -> Tensor");
  m.def("unpack_mask(Tensor words, int k_length) -> Tensor");
  m.def("id_mask(Tensor query_ids, Tensor key_ids, bool exact) -> Tensor");
  m.def("annealed_mask(int length, Tensor attn_mask_ratio, Tensor seed, Tensor step) -> Tensor");
  // for attention kernels: the bits in the order of a thread's accumulators, int32 [M, ceil(rows / 64),
  // ceil(columns / 128), 128, 2], of the mask or its transpose; and uint8 [M, tiles, tiles], 0 nothing allowed, 1
  // everything, 2 bits
  m.def("fragment_mask(Tensor words, int k_length, bool transpose) -> Tensor");
  m.def("mask_tile_classes(Tensor words, int k_length, int tile_rows, int tile_cols) -> Tensor");

  // --- attention: q [B, H, Lq, D], k and v [B, Hkv, Lk, D]; words None: causal or full by `causal`. tile_classes:
  // mask_tile_classes(words, Lk, 64, 64), which kernels on CUDA use to leave work out; None: they look at every bit.
  // deterministic: of the backward on CUDA, which otherwise sums dQ in any order
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? words, Tensor? tile_classes, Tensor? key_padding, bool causal,"
      " float scale, bool deterministic) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? words,"
      " Tensor? tile_classes, Tensor? key_padding, bool causal, float scale, bool deterministic)"
      " -> (Tensor dq, Tensor dk, Tensor dv)");

  // the same on sm_90a, D 64 and 128; fragments: fragment_mask(words, Lk, False); transposed_fragments: the same with
  // True, for the backward, which makes them where the forward was not given any
  m.def(
      "attention_hopper(Tensor q, Tensor k, Tensor v, Tensor? words, Tensor? fragments, Tensor? tile_classes,"
      " Tensor? key_padding, bool causal, float scale, bool deterministic, Tensor? transposed_fragments=None)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_hopper_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? words,"
      " Tensor? transposed_fragments, Tensor? tile_classes, Tensor? key_padding, bool causal, float scale,"
      " bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)");

  // --- shifted cross-entropy: nll [B, L] of the masked tokens, 0 elsewhere; softcap 0 is none
  m.def(
      "shifted_cross_entropy(Tensor logits, Tensor x0, Tensor masked, bool shift, float label_smoothing, float softcap)"
      " -> (Tensor nll, Tensor lse)");
  m.def(
      "shifted_cross_entropy_backward(Tensor dnll, Tensor logits, Tensor lse, Tensor x0, Tensor masked, bool shift,"
      " float label_smoothing, float softcap) -> Tensor dlogits");

  // --- the same from hidden [B, L, H] and weight [V, H], without the logits; chunk_rows 0 chooses by V;
  // max_scored bounds the scored tokens where the host knows one (-1: it asks the device)
  m.def(
      "linear_shifted_nll(Tensor hidden, Tensor weight, Tensor? bias, Tensor x0, Tensor masked, bool shift,"
      " float label_smoothing, float softcap, int chunk_rows, ScalarType accum_dtype, int max_scored) -> Tensor nll");
  m.def(
      "linear_shifted_nll_backward(Tensor dnll, Tensor hidden, Tensor weight, Tensor? bias, Tensor x0, Tensor masked,"
      " bool shift, float label_smoothing, float softcap, int chunk_rows, ScalarType accum_dtype, int max_scored, bool "
      "need_dhidden,"
      " bool need_dweight, bool need_dbias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_shifted_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor x0, Tensor masked,"
      " Tensor loss_weight, bool shift, float label_smoothing, float softcap, int chunk_rows, ScalarType accum_dtype, "
      "int max_scored,"
      " bool need_dhidden, bool need_dweight, bool need_dbias)"
      " -> (Tensor weighted_sum, Tensor nll_sum, Tensor count, Tensor dhidden, Tensor dweight, Tensor dbias)");

  // --- unmasking: values [8, N] are prob, sample_prob, p1, p2, gap, entropy, logsumexp, current_prob
  m.def(
      "token_stats(Tensor logits, Tensor? current, Tensor row_index, Tensor seed, Tensor step, float temperature,"
      " int top_k, float top_p, int forbid) -> (Tensor token, Tensor values)");
  m.def(
      "unmask(Tensor xt, Tensor masked, Tensor token, Tensor confidence, Tensor amount, Tensor seed, Tensor step,"
      " Tensor sample_index, str rule) -> (Tensor xt_out, Tensor committed, Tensor remaining)");
}
