// SPDX-License-Identifier: Apache-2.0
// The linear forms, once for CPU and CUDA. Rows of hidden that predict a scored token are gathered, then chunk by
// chunk: logits = rows W^T by torch's GEMM, one pass that turns each row of logits into its loss and, in place, its
// gradient, then two more GEMMs. One chunk of logits is alive.
//
// A Backend, made from (LinearProblem, scale, nll), has
//   static constexpr chunk_bytes                   of logits alive
//   static ScalarType buffer_dtype(ScalarType)     of rows and logits, for hidden's dtype
//   static int64_t padded(int64_t V)               row stride of the logits
//   int64_t n_rows() const                         scored tokens, or a bound on them that the host knows
//   void gather(first, n, rows), losses(first, n, logits, with_grad), scatter(first, n, drows, dhidden),
//   void add_column_sums(logits, n, dbias), Sums sums(loss_weight)
// The device's products, included before this file: gemm_into and gemm_add, and where its library makes a new tensor
// faster than it fills a given one, products_are_new(dtype) and new_product(a, b).
#pragma once

#include <algorithm>

#include "../common/dispatch.h"
#include "loss_plan.h"
#include "shifted_cross_entropy.h"

namespace diffullama {

struct LinearProblem {
  Tensor hidden;               // [B, L, H] in the buffer dtype
  Tensor weight;               // [V, H]
  std::optional<Tensor> bias;  // [V]
  Tensor x0, masked;           // [B, L]
  LossOptions options;
  int64_t B, L, H, V, chunk_rows;
  ScalarType dtype;  // of the input: hidden's
  ScalarType accum_dtype;
  int64_t max_scored;  // a bound on the scored tokens, or -1: ask the device

  ScalarType loss_dtype() const { return wide_dtype(dtype); }
};

struct GradientsNeeded {
  bool dhidden, dweight, dbias;
  bool any() const { return dhidden || dweight || dbias; }
};

struct Gradients {
  Tensor dhidden, dweight, dbias;  // [B, L, H] or [0]; [V, H] or [0]; [V] or [0]
};

struct Sums {
  Tensor weighted, plain, count;  // scalars
};

template <class Backend>
LinearProblem make_problem(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& x0, const Tensor& masked, LossOptions options, int64_t chunk_rows,
                           ScalarType accum_dtype, int64_t max_scored) {
  check_linear(hidden, weight, bias, x0, masked, options, chunk_rows, accum_dtype);
  const ScalarType buffer = Backend::buffer_dtype(hidden.scalar_type());
  const auto prepared = [buffer](const Tensor& t) { return as_contiguous(torch::stable::to(t, buffer)); };
  LinearProblem p{prepared(hidden), prepared(weight),     std::nullopt,   as_contiguous(x0), as_contiguous(masked),
                  options,          hidden.size(0),       hidden.size(1), hidden.size(2),    weight.size(0),
                  chunk_rows,       hidden.scalar_type(), accum_dtype,    max_scored};
  if (bias) p.bias = prepared(*bias);
  return p;
}

template <class Backend>
int64_t rows_of_chunk(const LinearProblem& p, int64_t n_rows) {
  const int64_t chosen = rows_within(Backend::chunk_bytes, p.V, static_cast<int64_t>(p.hidden.element_size()));
  return std::min(p.chunk_rows > 0 ? p.chunk_rows : chosen, std::max<int64_t>(n_rows, 1));
}

inline Gradients make_gradients(const LinearProblem& p, GradientsNeeded needed) {
  const auto zeros = [&](bool is_needed, std::vector<int64_t> shape, ScalarType dtype) {
    return zeros_like_device(p.hidden, is_needed ? shape : std::vector<int64_t>{0}, dtype);
  };
  return {zeros(needed.dhidden, {p.B, p.L, p.H}, p.hidden.scalar_type()),
          zeros(needed.dweight, {p.V, p.H}, p.accum_dtype), zeros(needed.dbias, {p.V}, p.accum_dtype)};
}

// a b: new, or in the first rows of `room`.
inline Tensor product_in(Tensor& room, const Tensor& a, const Tensor& b) {
  if (products_are_new(a.scalar_type())) return new_product(a, b);
  Tensor out = first_rows(room, a.size(0));
  gemm_into(out, a, b);
  return out;
}

// The rows that a product of n is made with: a new one is planned for its shape, which costs as much as 100 rows, so
// the many n of a training share a few shapes.
inline int64_t rows_of_product(int64_t n, ScalarType dtype) {
  constexpr int64_t kStep = 128, kFrom = 4 * kStep;
  return products_are_new(dtype) && n >= kFrom ? (n + kStep - 1) / kStep * kStep : n;
}

inline void zero_rows_from(Tensor& t, int64_t n) {
  Tensor rest = torch::stable::narrow(t, 0, n, t.size(0) - n);
  torch::stable::zero_(rest);
}

// Losses into the backend's nll; gradients of sum(scale * nll) where any are needed.
template <class Backend>
Gradients run_chunks(const LinearProblem& p, Backend& backend, GradientsNeeded needed) {
  Gradients grads = make_gradients(p, needed);
  const int64_t n_rows = backend.n_rows(), chunk = rows_of_chunk<Backend>(p, n_rows);
  if (n_rows == 0) return grads;
  const ScalarType buffer = p.hidden.scalar_type();
  const int64_t room = products_are_new(buffer) ? 0 : chunk;
  Tensor all_rows = empty_like_device(p.hidden, {rows_of_product(chunk, buffer), p.H}, buffer);
  Tensor padded_logits = empty_like_device(p.hidden, {room, Backend::padded(p.V)}, buffer);
  Tensor all_logits = torch::stable::narrow(padded_logits, 1, 0, p.V);
  Tensor all_drows = empty_like_device(p.hidden, {needed.dhidden ? room : 0, p.H}, buffer);
  for (int64_t first = 0; first < n_rows; first += chunk) {
    const int64_t n = std::min(chunk, n_rows - first);
    const int64_t n_product = rows_of_product(n, buffer);
    Tensor rows = first_rows(all_rows, n_product);
    if (n_product > n) zero_rows_from(rows, n);  // their logits and gradients are 0 and nobody reads them
    backend.gather(first, n, rows);
    Tensor logits = product_in(all_logits, rows, transposed(p.weight));  // [n, V]
    backend.losses(first, n, logits, needed.any());
    if (needed.dhidden) {
      const Tensor drows = product_in(all_drows, logits, p.weight);  // [n, H]
      backend.scatter(first, n, drows, grads.dhidden);
    }
    if (needed.dweight) gemm_add(grads.dweight, transposed(logits), rows);  // [V, H]
    if (needed.dbias) backend.add_column_sums(logits, n, grads.dbias);
  }
  return grads;
}

// --- the three ops

template <class Backend>
Tensor linear_shifted_nll(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& x0,
                          const Tensor& masked, bool shift, double label_smoothing, double softcap, int64_t chunk_rows,
                          ScalarType accum_dtype, int64_t max_scored) {
  const LinearProblem p = make_problem<Backend>(hidden, weight, bias, x0, masked, {shift, label_smoothing, softcap},
                                                chunk_rows, accum_dtype, max_scored);
  const Tensor nll = zeros_like_device(hidden, {p.B, p.L}, p.loss_dtype());
  Backend backend(p, std::nullopt, nll);
  run_chunks(p, backend, {false, false, false});
  return nll;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> linear_shifted_nll_backward(
    const Tensor& dnll, const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& x0,
    const Tensor& masked, bool shift, double label_smoothing, double softcap, int64_t chunk_rows,
    ScalarType accum_dtype, int64_t max_scored, bool need_dhidden, bool need_dweight, bool need_dbias) {
  const LinearProblem p = make_problem<Backend>(hidden, weight, bias, x0, masked, {shift, label_smoothing, softcap},
                                                chunk_rows, accum_dtype, max_scored);
  check_tensor("dnll", dnll, p.loss_dtype(), {p.B, p.L}, &hidden);
  const Tensor nll = zeros_like_device(hidden, {p.B, p.L}, p.loss_dtype());
  Backend backend(p, as_contiguous(dnll), nll);
  const Gradients grads = run_chunks(p, backend, {need_dhidden, need_dweight, need_dbias});
  return {torch::stable::to(grads.dhidden, p.dtype), grads.dweight, grads.dbias};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_shifted_cross_entropy(
    const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& x0, const Tensor& masked,
    const Tensor& loss_weight, bool shift, double label_smoothing, double softcap, int64_t chunk_rows,
    ScalarType accum_dtype, int64_t max_scored, bool need_dhidden, bool need_dweight, bool need_dbias) {
  const LinearProblem p = make_problem<Backend>(hidden, weight, bias, x0, masked, {shift, label_smoothing, softcap},
                                                chunk_rows, accum_dtype, max_scored);
  check_tensor("loss_weight", loss_weight, p.loss_dtype(), {p.B, p.L}, &hidden);
  const Tensor nll = zeros_like_device(hidden, {p.B, p.L}, p.loss_dtype()), weights = as_contiguous(loss_weight);
  Backend backend(p, weights, nll);
  const Gradients grads = run_chunks(p, backend, {need_dhidden, need_dweight, need_dbias});
  const Sums sums = backend.sums();
  return {sums.weighted, sums.plain, sums.count, torch::stable::to(grads.dhidden, p.dtype), grads.dweight, grads.dbias};
}

}  // namespace diffullama
