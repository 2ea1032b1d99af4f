// SPDX-License-Identifier: Apache-2.0
// The linear forms on the CPU. The scored rows of hidden are gathered, then chunk by chunk: logits = rows W^T by
// torch's GEMM, one pass that turns each row of logits into its loss and, in place, its gradient, then two more GEMMs.
// One chunk of logits is alive. bfloat16 and float16 compute in float; double stays.
#include <algorithm>

#include "../common/dispatch.h"
#include "../common/gemm_cpu.h"
#include "loss_row.h"

namespace diffullama {
namespace {

constexpr int64_t kChunkBytes = int64_t{32} << 20;  // of logits; larger chunks gain nothing in the GEMMs, cost memory

struct Problem {
  Tensor hidden;               // [B, L, H] in the computing dtype
  Tensor weight;               // [V, H]
  std::optional<Tensor> bias;  // [V]
  Tensor x0;                   // [B, L]
  std::vector<Scored> scored;
  LossOptions options;
  int64_t B, L, H, V, chunk_rows;
  ScalarType dtype, accum_dtype;
};

struct Gradients {
  Tensor dhidden, dweight, dbias;  // [B, L, H] or [0]; [V, H] or [0]; [V] or [0]
  bool need_dhidden, need_dweight, need_dbias;
  bool any() const { return need_dhidden || need_dweight || need_dbias; }
};

Problem make_problem(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& x0,
                     const Tensor& masked, LossOptions options, int64_t chunk_rows, ScalarType accum_dtype) {
  check_linear(hidden, weight, bias, x0, masked, options, chunk_rows, accum_dtype);
  const ScalarType dtype = wide_dtype(hidden.scalar_type());
  const auto prepared = [dtype](const Tensor& t) { return as_contiguous(torch::stable::to(t, dtype)); };
  Problem p{prepared(hidden), prepared(weight), std::nullopt,   as_contiguous(x0), {}, options,
            hidden.size(0),   hidden.size(1),   hidden.size(2), weight.size(0),    0,  dtype,
            accum_dtype};
  if (bias) p.bias = prepared(*bias);
  const Tensor masked_c = as_contiguous(masked);
  p.scored = scored_tokens(masked_c.const_data_ptr<bool>(), p.B, p.L, options.shift);
  check_ids(p.scored, p.x0.const_data_ptr<int64_t>(), p.V);
  const int64_t row_bytes = std::max<int64_t>(p.V, 1) * (dtype == ScalarType::Double ? 8 : 4);
  p.chunk_rows = chunk_rows > 0 ? chunk_rows : std::clamp<int64_t>(kChunkBytes / row_bytes, 64, 4096);
  p.chunk_rows = std::min<int64_t>(p.chunk_rows, std::max<size_t>(p.scored.size(), 1));
  return p;
}

Gradients make_gradients(const Problem& p, bool need_dhidden, bool need_dweight, bool need_dbias) {
  const auto zeros = [&](bool needed, std::vector<int64_t> shape, ScalarType dtype) {
    return zeros_like_device(p.hidden, needed ? shape : std::vector<int64_t>{0}, dtype);
  };
  return {zeros(need_dhidden, {p.B, p.L, p.H}, p.dtype),
          zeros(need_dweight, {p.V, p.H}, p.accum_dtype),
          zeros(need_dbias, {p.V}, p.accum_dtype),
          need_dhidden,
          need_dweight,
          need_dbias};
}

// dbias += column sums of dlogits [n, V]
template <class Acc, class Sum>
void add_column_sums(const Acc* dlogits, int64_t n, int64_t V, Sum* dbias) {
  torch::stable::parallel_for(0, V, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t v = begin; v < end; ++v) dbias[v] += static_cast<Sum>(dlogits[i * V + v]);
    }
  });
}

template <class Acc>
class ChunkLoop {
 public:
  // scale [B, L]: what each token's gradient is multiplied by; null where no gradient is needed.
  ChunkLoop(const Problem& p, Gradients& grads, const Acc* scale, Acc* nll)
      : p_(p),
        grads_(grads),
        scale_(scale),
        nll_(nll),
        rows_(empty_like_device(p.hidden, {p.chunk_rows, p.H}, p.dtype)),
        logits_(empty_like_device(p.hidden, {p.chunk_rows, p.V}, p.dtype)),
        drows_(empty_like_device(p.hidden, {grads.need_dhidden ? p.chunk_rows : 0, p.H}, p.dtype)) {}

  void run() {
    const int64_t n_scored = static_cast<int64_t>(p_.scored.size());
    for (int64_t first = 0; first < n_scored; first += p_.chunk_rows) {
      chunk(first, std::min(p_.chunk_rows, n_scored - first));
    }
  }

 private:
  void chunk(int64_t first, int64_t n) {
    Tensor rows = first_rows(rows_, n), logits = first_rows(logits_, n);
    gather(first, n, rows);
    gemm_into(logits, rows, transposed(p_.weight));  // [n, V]
    losses(first, n, logits.mutable_data_ptr<Acc>());
    if (grads_.need_dhidden) {
      Tensor drows = first_rows(drows_, n);
      gemm_into(drows, logits, p_.weight);  // [n, H]
      scatter(first, n, drows);
    }
    if (grads_.need_dweight) gemm_add(grads_.dweight, transposed(logits), rows);  // [V, H]
    if (grads_.need_dbias) {
      with_float_type(p_.accum_dtype, [&](auto type) {
        using Sum = typename decltype(type)::type;
        add_column_sums(logits.const_data_ptr<Acc>(), n, p_.V, grads_.dbias.mutable_data_ptr<Sum>());
      });
    }
  }

  void gather(int64_t first, int64_t n, Tensor& rows) {
    const Acc* in = p_.hidden.const_data_ptr<Acc>();
    Acc* out = rows.mutable_data_ptr<Acc>();
    for (int64_t i = 0; i < n; ++i) std::copy_n(in + p_.scored[first + i].row * p_.H, p_.H, out + i * p_.H);
  }

  void scatter(int64_t first, int64_t n, const Tensor& drows) {
    const Acc* in = drows.const_data_ptr<Acc>();
    Acc* out = grads_.dhidden.mutable_data_ptr<Acc>();
    for (int64_t i = 0; i < n; ++i) std::copy_n(in + i * p_.H, p_.H, out + p_.scored[first + i].row * p_.H);
  }

  void losses(int64_t first, int64_t n, Acc* logits) {
    const int64_t* ids = p_.x0.const_data_ptr<int64_t>();
    const Acc* bias = p_.bias ? p_.bias->const_data_ptr<Acc>() : nullptr;
    const Acc smoothing = static_cast<Acc>(p_.options.label_smoothing), softcap = static_cast<Acc>(p_.options.softcap);
    const bool with_grad = grads_.any();
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = p_.scored[first + i].token, target = ids[token];
        Acc* z = logits + i * p_.V;
        if (bias) add_bias(z, bias, p_.V);
        if (softcap > 0) apply_softcap(z, p_.V, softcap);
        const Acc lse = row_lse(z, p_.V);
        if (nll_) nll_[token] = row_loss(z, p_.V, target, lse, smoothing);
        if (with_grad) row_gradient(z, p_.V, target, lse, scale_[token], smoothing, softcap);
      }
    });
  }

  const Problem& p_;
  Gradients& grads_;
  const Acc* scale_;
  Acc* nll_;
  Tensor rows_, logits_, drows_;
};

// nll [B, L], and gradients of sum(scale * nll) where any are needed.
Tensor run(const Problem& p, Gradients& grads, const std::optional<Tensor>& scale) {
  Tensor nll = zeros_like_device(p.hidden, {p.B, p.L}, p.dtype);
  if (p.scored.empty()) return nll;
  const auto loop = [&](auto zero) {
    using Acc = decltype(zero);
    ChunkLoop<Acc>(p, grads, scale ? scale->const_data_ptr<Acc>() : nullptr, nll.mutable_data_ptr<Acc>()).run();
  };
  p.dtype == ScalarType::Double ? loop(double{}) : loop(float{});
  return nll;
}

Tensor linear_shifted_nll_cpu(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& x0,
                              const Tensor& masked, bool shift, double label_smoothing, double softcap,
                              int64_t chunk_rows, ScalarType accum_dtype) {
  const Problem p =
      make_problem(hidden, weight, bias, x0, masked, {shift, label_smoothing, softcap}, chunk_rows, accum_dtype);
  Gradients none = make_gradients(p, false, false, false);
  return run(p, none, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> linear_shifted_nll_backward_cpu(
    const Tensor& dnll, const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& x0,
    const Tensor& masked, bool shift, double label_smoothing, double softcap, int64_t chunk_rows,
    ScalarType accum_dtype, bool need_dhidden, bool need_dweight, bool need_dbias) {
  const Problem p =
      make_problem(hidden, weight, bias, x0, masked, {shift, label_smoothing, softcap}, chunk_rows, accum_dtype);
  check_tensor("dnll", dnll, p.dtype, {p.B, p.L}, &hidden);
  Gradients grads = make_gradients(p, need_dhidden, need_dweight, need_dbias);
  run(p, grads, as_contiguous(dnll));
  return {grads.dhidden, grads.dweight, grads.dbias};
}

template <class Acc>
std::tuple<double, double> weighted_sums(const Problem& p, const Tensor& nll, const Tensor& loss_weight) {
  const Acc *nll_data = nll.const_data_ptr<Acc>(), *w = loss_weight.const_data_ptr<Acc>();
  double weighted = 0.0, plain = 0.0;
  for (const Scored& s : p.scored) {
    weighted += static_cast<double>(w[s.token]) * static_cast<double>(nll_data[s.token]);
    plain += static_cast<double>(nll_data[s.token]);
  }
  return {weighted, plain};
}

Tensor scalar_tensor(const Problem& p, double value) {
  Tensor t = empty_like_device(p.hidden, {}, p.dtype);
  torch::stable::fill_(t, value);
  return t;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_shifted_cross_entropy_cpu(
    const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& x0, const Tensor& masked,
    const Tensor& loss_weight, bool shift, double label_smoothing, double softcap, int64_t chunk_rows,
    ScalarType accum_dtype, bool need_dhidden, bool need_dweight, bool need_dbias) {
  const Problem p =
      make_problem(hidden, weight, bias, x0, masked, {shift, label_smoothing, softcap}, chunk_rows, accum_dtype);
  check_tensor("loss_weight", loss_weight, p.dtype, {p.B, p.L}, &hidden);
  const Tensor weights = as_contiguous(loss_weight);
  Gradients grads = make_gradients(p, need_dhidden, need_dweight, need_dbias);
  const Tensor nll = run(p, grads, weights);
  const auto [weighted, plain] =
      p.dtype == ScalarType::Double ? weighted_sums<double>(p, nll, weights) : weighted_sums<float>(p, nll, weights);
  Tensor count = empty_like_device(hidden, {}, ScalarType::Long);
  *count.mutable_data_ptr<int64_t>() = static_cast<int64_t>(p.scored.size());
  return {scalar_tensor(p, weighted), scalar_tensor(p, plain), count, grads.dhidden, grads.dweight, grads.dbias};
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) {
  m.impl("linear_shifted_nll", TORCH_BOX(&diffullama::linear_shifted_nll_cpu));
  m.impl("linear_shifted_nll_backward", TORCH_BOX(&diffullama::linear_shifted_nll_backward_cpu));
  m.impl("linear_shifted_cross_entropy", TORCH_BOX(&diffullama::linear_shifted_cross_entropy_cpu));
}
