// SPDX-License-Identifier: Apache-2.0
// The CUDA backend of the linear forms: buffers in the input's dtype, rows of logits padded to whole vectors (an odd V
// costs cuBLAS several times the even one otherwise), the scored tokens listed on the device. The host learns how many
// they are from max_scored; where that is -1 it asks the device once, which waits for the stream.
#include "../common/gemm_cuda.h"
// Above: the GEMMs that the chunk loop calls.
#include "linear_chunks.h"
#include "loss_cuda.h"
#include "loss_plan.h"

namespace diffullama {
namespace {

class CudaBackend {
 public:
  static constexpr int64_t chunk_bytes = kChunkBytes;
  static ScalarType buffer_dtype(ScalarType dtype) { return dtype; }
  static int64_t padded(int64_t V) { return ceil_div(V, 8) * 8; }

  CudaBackend(const LinearProblem& p, std::optional<Tensor> scale, const Tensor& nll)
      : p_(p),
        guard_(p.hidden.get_device_index()),
        stream_(current_stream(p.hidden)),
        element_(element_of(p.dtype)),
        scale_(std::move(scale)),
        nll_(nll),
        count_(empty_like_device(p.hidden, {1}, ScalarType::Long)),
        bound_(p.max_scored >= 0 ? std::min(p.max_scored, p.B * p.L) : p.B * p.L),
        tokens_(empty_like_device(p.hidden, {bound_}, ScalarType::Long)) {
    if (p.B * p.L == 0) {
      torch::stable::zero_(count_);
      return;
    }
    check_launch("scored_tokens_kernel",
                 launch_scored_tokens(targets_of(p.x0, p.masked, p.V, p.options), scored(), nll_.mutable_data_ptr(),
                                      p.loss_dtype() == ScalarType::Double, stream_));
    if (p.max_scored < 0) bound_ = count_on_host();
  }

  int64_t n_rows() const { return bound_; }

  void gather(int64_t first, int64_t n, Tensor& rows) const {
    ChunkParams c = chunk(first, n);
    c.rows = rows.mutable_data_ptr();
    check_launch("gather_rows_kernel", launch_gather_rows(c, element_size(), stream_));
  }

  void losses(int64_t first, int64_t n, Tensor& logits, bool with_grad) const {
    ChunkParams c = chunk(first, n);
    c.logits = logits.mutable_data_ptr();
    c.stride = logits.stride(0);
    c.bias = p_.bias ? p_.bias->const_data_ptr() : nullptr;
    c.scale = scale_ ? scale_->const_data_ptr() : nullptr;
    c.nll = nll_.mutable_data_ptr();
    check_launch("chunk_loss_kernel", launch_chunk_loss(c, element_, with_grad, stream_));
  }

  void scatter(int64_t first, int64_t n, const Tensor& drows, Tensor& dhidden) const {
    ChunkParams c = chunk(first, n);
    c.drows = drows.const_data_ptr();
    c.dhidden = dhidden.mutable_data_ptr();
    check_launch("scatter_rows_kernel", launch_scatter_rows(c, element_size(), stream_));
  }

  void add_column_sums(const Tensor& dlogits, int64_t n, Tensor& dbias) const {
    ChunkParams c = chunk(0, n);
    c.logits = dlogits.mutable_data_ptr();
    c.stride = dlogits.stride(0);
    c.dbias = dbias.mutable_data_ptr();
    c.dbias_is_double = p_.accum_dtype == ScalarType::Double;
    check_launch("column_sums_kernel", launch_column_sums(c, element_, stream_));
  }

  Sums sums() const {
    Sums out{empty_like_device(p_.hidden, {}, p_.loss_dtype()), empty_like_device(p_.hidden, {}, p_.loss_dtype()),
             torch::stable::view(count_, std::vector<int64_t>{})};
    SumsParams s{};
    s.scored = scored();
    s.nll = nll_.const_data_ptr();
    s.weight = scale_->const_data_ptr();
    s.weighted = out.weighted.mutable_data_ptr();
    s.plain = out.plain.mutable_data_ptr();
    s.is_double = p_.loss_dtype() == ScalarType::Double;
    check_launch("loss_sums_kernel", launch_sums(s, stream_));
    return out;
  }

 private:
  ScoredTokens scored() const {
    return {tokens_.mutable_data_ptr<int64_t>(), count_.mutable_data_ptr<int64_t>(), tokens_.numel()};
  }

  int64_t count_on_host() const {
    const Tensor host = torch::stable::to(count_, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    return *host.const_data_ptr<int64_t>();
  }

  int element_size() const { return static_cast<int>(p_.hidden.element_size()); }

  ChunkParams chunk(int64_t first, int64_t n) const {
    ChunkParams c{};
    c.targets = targets_of(p_.x0, p_.masked, p_.V, p_.options);
    c.scored = scored();
    c.first = first;
    c.n = n;
    c.hidden = p_.hidden.const_data_ptr();
    c.H = p_.H;
    return c;
  }

  const LinearProblem& p_;
  DeviceGuard guard_;
  cudaStream_t stream_;
  Element element_;
  std::optional<Tensor> scale_;
  Tensor nll_, count_;
  int64_t bound_;  // rows to compute
  Tensor tokens_;
};

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  using diffullama::CudaBackend;
  m.impl("linear_shifted_nll", TORCH_BOX(&diffullama::linear_shifted_nll<CudaBackend>));
  m.impl("linear_shifted_nll_backward", TORCH_BOX(&diffullama::linear_shifted_nll_backward<CudaBackend>));
  m.impl("linear_shifted_cross_entropy", TORCH_BOX(&diffullama::linear_shifted_cross_entropy<CudaBackend>));
}
