// SPDX-License-Identifier: Apache-2.0
// shifted_cross_entropy and its backward on the CPU: the scored rows of logits in parallel, each staged in a thread's
// scratch row of float (double for double logits).
#include <algorithm>

#include "../common/dispatch.h"
#include "loss_row.h"

namespace diffullama {
namespace {

template <class T, class Acc>
DIFFULLAMA_VECTORIZED void load_row(const T* logits, int64_t V, Acc* z) {
  for (int64_t v = 0; v < V; ++v) z[v] = static_cast<Acc>(logits[v]);
}

template <class T, class Acc>
DIFFULLAMA_VECTORIZED void store_row(const Acc* z, int64_t V, T* out) {
  for (int64_t v = 0; v < V; ++v) out[v] = static_cast<T>(z[v]);
}

template <class T, class Acc>
void stage_row(const T* logits, int64_t V, double softcap, Acc* z) {
  load_row(logits, V, z);
  if (softcap > 0) apply_softcap(z, V, static_cast<Acc>(softcap));
}

int64_t row_grain(int64_t V) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(V, 1)); }

std::tuple<Tensor, Tensor> shifted_cross_entropy_cpu(const Tensor& logits, const Tensor& x0, const Tensor& masked,
                                                     bool shift, double label_smoothing, double softcap) {
  check_targets("logits", logits, x0, masked, {shift, label_smoothing, softcap});
  const int64_t B = logits.size(0), L = logits.size(1), V = logits.size(2);
  const Tensor logits_c = as_contiguous(logits), x0_c = as_contiguous(x0);
  const Tensor masked_c = as_contiguous(masked);
  const std::vector<Scored> scored = scored_tokens(masked_c.const_data_ptr<bool>(), B, L, shift);
  const int64_t* ids = x0_c.const_data_ptr<int64_t>();
  check_ids(scored, ids, V);
  const ScalarType wide = wide_dtype(logits.scalar_type());
  Tensor nll = zeros_like_device(logits, {B, L}, wide), lse = zeros_like_device(logits, {B, L}, wide);
  with_float_type(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = Wide<T>;
    const T* in = logits_c.const_data_ptr<T>();
    Acc *nll_data = nll.mutable_data_ptr<Acc>(), *lse_data = lse.mutable_data_ptr<Acc>();
    torch::stable::parallel_for(0, scored.size(), row_grain(V), [&](int64_t begin, int64_t end) {
      std::vector<Acc> z(V);
      for (int64_t i = begin; i < end; ++i) {
        const Scored s = scored[i];
        stage_row(in + s.row * V, V, softcap, z.data());
        lse_data[s.token] = row_lse(z.data(), V);
        nll_data[s.token] = row_loss(z.data(), V, ids[s.token], lse_data[s.token], static_cast<Acc>(label_smoothing));
      }
    });
  });
  return {nll, lse};
}

Tensor shifted_cross_entropy_backward_cpu(const Tensor& dnll, const Tensor& logits, const Tensor& lse, const Tensor& x0,
                                          const Tensor& masked, bool shift, double label_smoothing, double softcap) {
  check_targets("logits", logits, x0, masked, {shift, label_smoothing, softcap});
  const int64_t B = logits.size(0), L = logits.size(1), V = logits.size(2);
  const ScalarType wide = wide_dtype(logits.scalar_type());
  check_tensor("dnll", dnll, wide, {B, L}, &logits);
  check_tensor("lse", lse, wide, {B, L}, &logits);
  const Tensor logits_c = as_contiguous(logits), x0_c = as_contiguous(x0);
  const Tensor masked_c = as_contiguous(masked), dnll_c = as_contiguous(dnll);
  const Tensor lse_c = as_contiguous(lse);
  const std::vector<Scored> scored = scored_tokens(masked_c.const_data_ptr<bool>(), B, L, shift);
  const int64_t* ids = x0_c.const_data_ptr<int64_t>();
  check_ids(scored, ids, V);
  Tensor dlogits = zeros_like_device(logits, {B, L, V}, logits.scalar_type());
  with_float_type(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = Wide<T>;
    const T* in = logits_c.const_data_ptr<T>();
    T* out = dlogits.mutable_data_ptr<T>();
    const Acc *dnll_data = dnll_c.const_data_ptr<Acc>(), *lse_data = lse_c.const_data_ptr<Acc>();
    torch::stable::parallel_for(0, scored.size(), row_grain(V), [&](int64_t begin, int64_t end) {
      std::vector<Acc> z(V);
      for (int64_t i = begin; i < end; ++i) {
        const Scored s = scored[i];
        stage_row(in + s.row * V, V, softcap, z.data());
        row_gradient(z.data(), V, ids[s.token], lse_data[s.token], dnll_data[s.token],
                     static_cast<Acc>(label_smoothing), static_cast<Acc>(softcap));
        store_row(z.data(), V, out + s.row * V);
      }
    });
  });
  return dlogits;
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) {
  m.impl("shifted_cross_entropy", TORCH_BOX(&diffullama::shifted_cross_entropy_cpu));
  m.impl("shifted_cross_entropy_backward", TORCH_BOX(&diffullama::shifted_cross_entropy_backward_cpu));
}
