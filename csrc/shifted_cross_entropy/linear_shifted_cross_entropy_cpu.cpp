// SPDX-License-Identifier: Apache-2.0
// The CPU backend of the linear forms: loops over rows. bfloat16 and float16 compute in float; double stays.
#include "../common/gemm_cpu.h"
// Above: the GEMMs that the chunk loop calls.
#include "linear_chunks.h"
#include "loss_row.h"

namespace diffullama {
namespace {

// dbias += column sums of dlogits [n, V]
template <class Acc, class Sum>
void add_columns(const Acc* dlogits, int64_t n, int64_t V, Sum* dbias) {
  torch::stable::parallel_for(0, V, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t v = begin; v < end; ++v) dbias[v] += static_cast<Sum>(dlogits[i * V + v]);
    }
  });
}

template <class F>
void with_wide_type(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

class CpuBackend {
 public:
  static constexpr int64_t chunk_bytes = int64_t{32} << 20;  // larger chunks gain nothing in the GEMMs, cost memory
  static ScalarType buffer_dtype(ScalarType dtype) { return wide_dtype(dtype); }
  static int64_t padded(int64_t V) { return V; }

  // scale [B, L]: what each token's gradient is multiplied by; none where no gradient is needed.
  CpuBackend(const LinearProblem& p, std::optional<Tensor> scale, const Tensor& nll)
      : p_(p), scale_(std::move(scale)), nll_(nll), ids_(p.x0.const_data_ptr<int64_t>()) {
    scored_ = scored_tokens(p.masked.const_data_ptr<bool>(), p.B, p.L, p.options.shift);
    check_ids(scored_, ids_, p.V);
    check(p.max_scored < 0 || n_rows() <= p.max_scored, "max_scored must be at least the ", n_rows(),
          " scored tokens, got ", p.max_scored);
  }

  int64_t n_rows() const { return static_cast<int64_t>(scored_.size()); }

  void gather(int64_t first, int64_t n, Tensor& rows) const {
    with_wide_type(p_.hidden.scalar_type(), [&](auto zero) {
      using Acc = decltype(zero);
      const Acc* in = p_.hidden.const_data_ptr<Acc>();
      Acc* out = rows.mutable_data_ptr<Acc>();
      for (int64_t i = 0; i < n; ++i) std::copy_n(in + scored_[first + i].row * p_.H, p_.H, out + i * p_.H);
    });
  }

  void scatter(int64_t first, int64_t n, const Tensor& drows, Tensor& dhidden) const {
    with_wide_type(p_.hidden.scalar_type(), [&](auto zero) {
      using Acc = decltype(zero);
      const Acc* in = drows.const_data_ptr<Acc>();
      Acc* out = dhidden.mutable_data_ptr<Acc>();
      for (int64_t i = 0; i < n; ++i) std::copy_n(in + i * p_.H, p_.H, out + scored_[first + i].row * p_.H);
    });
  }

  void losses(int64_t first, int64_t n, Tensor& logits, bool with_grad) const {
    with_wide_type(p_.hidden.scalar_type(),
                   [&](auto zero) { row_losses<decltype(zero)>(first, n, logits, with_grad); });
  }

  void add_column_sums(const Tensor& dlogits, int64_t n, Tensor& dbias) const {
    with_wide_type(p_.hidden.scalar_type(), [&](auto zero) {
      with_wide_type(p_.accum_dtype, [&](auto sum) {
        add_columns(dlogits.const_data_ptr<decltype(zero)>(), n, p_.V, dbias.mutable_data_ptr<decltype(sum)>());
      });
    });
  }

  Sums sums() const {
    double weighted = 0.0, plain = 0.0;
    with_wide_type(p_.loss_dtype(), [&](auto zero) {
      using Acc = decltype(zero);
      const Acc *nll = nll_.const_data_ptr<Acc>(), *w = scale_->const_data_ptr<Acc>();
      for (const Scored& s : scored_) {
        weighted += static_cast<double>(w[s.token]) * static_cast<double>(nll[s.token]);
        plain += static_cast<double>(nll[s.token]);
      }
    });
    Tensor count = empty_like_device(p_.hidden, {}, ScalarType::Long);
    *count.mutable_data_ptr<int64_t>() = n_rows();
    return {scalar(weighted), scalar(plain), count};
  }

 private:
  template <class Acc>
  void row_losses(int64_t first, int64_t n, Tensor& logits, bool with_grad) const {
    Acc *z0 = logits.mutable_data_ptr<Acc>(), *nll = nll_.mutable_data_ptr<Acc>();
    const Acc* bias = p_.bias ? p_.bias->const_data_ptr<Acc>() : nullptr;
    const Acc* scale = with_grad ? scale_->const_data_ptr<Acc>() : nullptr;
    const Acc smoothing = static_cast<Acc>(p_.options.label_smoothing), softcap = static_cast<Acc>(p_.options.softcap);
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = scored_[first + i].token, target = ids_[token];
        Acc* z = z0 + i * p_.V;
        if (bias) add_bias(z, bias, p_.V);
        if (softcap > 0) apply_softcap(z, p_.V, softcap);
        const Acc lse = row_lse(z, p_.V);
        nll[token] = row_loss(z, p_.V, target, lse, smoothing);
        if (with_grad) row_gradient(z, p_.V, target, lse, scale[token], smoothing, softcap);
      }
    });
  }

  Tensor scalar(double value) const {
    Tensor t = empty_like_device(p_.hidden, {}, p_.loss_dtype());
    torch::stable::fill_(t, value);
    return t;
  }

  const LinearProblem& p_;
  std::optional<Tensor> scale_;
  Tensor nll_;
  const int64_t* ids_;
  std::vector<Scored> scored_;
};

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) {
  using diffullama::CpuBackend;
  m.impl("linear_shifted_nll", TORCH_BOX(&diffullama::linear_shifted_nll<CpuBackend>));
  m.impl("linear_shifted_nll_backward", TORCH_BOX(&diffullama::linear_shifted_nll_backward<CpuBackend>));
  m.impl("linear_shifted_cross_entropy", TORCH_BOX(&diffullama::linear_shifted_cross_entropy<CpuBackend>));
}
