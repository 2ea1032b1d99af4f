// SPDX-License-Identifier: Apache-2.0
// The loss kernels: one block of 512 threads a row of logits.
//   chunk_gradient_kernel : reads a row of the chunk once (kept in registers up to 64 Ki 16-bit logits, else read again
//                           from L2), writes its nll and, in place, its gradient. Traffic 2 * V * element a row
//   chunk_nll_kernel      : the same without gradient; V * element
//   logits_nll_kernel, logits_gradient_kernel : from [B, L, V] logits; unscored rows cost a store, or a row of zeros
//   gather, scatter       : rows of hidden, 16-byte copies where aligned
//   column_sums_kernel    : a thread a column over the chunk's rows, in order
//   scored_tokens_kernel  : one block compacts the scored tokens in order
//   deterministic         : fixed trees, no atomics. int64 offsets
//   none of these spills on sm_90, but for 16 B in chunk_nll_kernel<double>; ptxas trades registers for occupancy and
//   spills up to 0.3 KB of chunk_gradient_kernel on sm_100, 1.5 KB on sm_120, 8 B of logits_nll_kernel on sm_100
// Not yet measured on GPU.
#include "loss_kernel.h"

#include "../common/cuda_block.cuh"
#include "../common/launch.h"
#include "loss_row.cuh"

namespace diffullama {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kScanThreads = 1024;

__device__ __forceinline__ bool is_scored(const LossTargets& t, int64_t token) {
  return t.masked[token] && !(t.shift && token % t.L == 0);
}

// --- the list of scored tokens

struct ScanShared {
  int warp[kScanThreads / kWarp];
};

template <class Acc>
__global__ void __launch_bounds__(kScanThreads) scored_tokens_kernel(LossTargets t, ScoredTokens out, Acc* nll) {
  ScanShared& shared = static_shared<ScanShared>();
  const int64_t n_tokens = t.B * t.L;
  int64_t before = 0;
  for (int64_t first = 0; first < n_tokens; first += kScanThreads) {  // uniform: the scan has barriers
    const int64_t token = first + threadIdx.x;
    const bool scored = token < n_tokens && is_scored(t, token);
    int in_step;
    const int64_t slot = before + block_exclusive_scan<kScanThreads>(scored, shared.warp, in_step);
    if (scored && slot < out.max_scored) out.token[slot] = token;
    if (scored && slot >= out.max_scored) nll[token] = Acc(NAN);
    before += in_step;
  }
  if (threadIdx.x == 0) *out.count = before;
}

// --- chunks of the linear form

// Token of row `first + i` of the scored list, or -1 past its end (a bound, not the count, sized the chunk).
__device__ __forceinline__ int64_t token_of(const ChunkParams& p, int64_t i) {
  return p.first + i < *p.scored.count ? p.scored.token[p.first + i] : -1;
}

template <class Word>
__global__ void __launch_bounds__(kCopyThreads) gather_rows_kernel(ChunkParams p, int64_t words) {
  const int64_t token = token_of(p, blockIdx.x);
  Word* out = static_cast<Word*>(p.rows) + blockIdx.x * words;
  const Word* in = static_cast<const Word*>(p.hidden) + (token - p.targets.shift) * words;
  for (int64_t i = threadIdx.x; i < words; i += kCopyThreads) out[i] = token >= 0 ? in[i] : Word{};
}

template <class Word>
__global__ void __launch_bounds__(kCopyThreads) scatter_rows_kernel(ChunkParams p, int64_t words) {
  const int64_t token = token_of(p, blockIdx.x);
  if (token < 0) return;
  const Word* in = static_cast<const Word*>(p.drows) + blockIdx.x * words;
  Word* out = static_cast<Word*>(p.dhidden) + (token - p.targets.shift) * words;
  for (int64_t i = threadIdx.x; i < words; i += kCopyThreads) out[i] = in[i];
}

template <class T>
__device__ LogitMap<T> chunk_map(const ChunkParams& p) {
  return {static_cast<const T*>(p.bias), static_cast<WideT<T>>(p.targets.softcap)};
}

template <class T>
__global__ void __launch_bounds__(kLossThreads) chunk_nll_kernel(ChunkParams p, bool aligned) {
  using Acc = WideT<T>;
  LossShared<Acc>& shared = static_shared<LossShared<Acc>>();
  const int64_t token = token_of(p, blockIdx.x);
  if (token < 0) return;
  const T* z = static_cast<const T*>(p.logits) + blockIdx.x * p.stride;
  const Row<T, 0> row(z, p.targets.V, aligned);
  const RowLoss<Acc> loss = row_loss(row, z, p.targets.V, p.targets.x0[token], chunk_map<T>(p),
                                     static_cast<Acc>(p.targets.label_smoothing), shared);
  if (threadIdx.x == 0) static_cast<Acc*>(p.nll)[token] = loss.nll;
}

template <class T, int kResident>
__global__ void __launch_bounds__(kLossThreads) chunk_gradient_kernel(ChunkParams p, bool aligned) {
  using Acc = WideT<T>;
  LossShared<Acc>& shared = static_shared<LossShared<Acc>>();
  const int64_t token = token_of(p, blockIdx.x), V = p.targets.V;
  T* z = static_cast<T*>(p.logits) + blockIdx.x * p.stride;
  const Row<T, kResident> row(z, V, aligned);
  if (token < 0) {  // the GEMMs that follow take the row: it must add nothing
    row.write(z, [](Acc, int64_t) { return Acc(0); });
    return;
  }
  const int64_t target = p.targets.x0[token];
  const Acc smoothing = static_cast<Acc>(p.targets.label_smoothing), uniform = smoothing / static_cast<Acc>(V);
  const LogitMap<T> map = chunk_map<T>(p);
  const RowLoss<Acc> loss = row_loss(row, z, V, target, map, smoothing, shared);
  if (threadIdx.x == 0) static_cast<Acc*>(p.nll)[token] = loss.nll;
  const bool valid = target >= 0 && target < V;
  const Acc scale = valid ? static_cast<const Acc*>(p.scale)[token] : Acc(NAN);
  row.write(z, [&](Acc raw, int64_t v) {
    return logit_gradient<T>(raw, v, target, loss.lse, scale, smoothing, uniform, map);
  });
}

template <class T, class Sum>
__global__ void __launch_bounds__(kCopyThreads) column_sums_kernel(ChunkParams p) {
  const int64_t v = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x;
  if (v >= p.targets.V) return;
  const T* column = static_cast<const T*>(p.logits) + v;
  Sum sum = 0;
  for (int64_t i = 0; i < p.n; ++i) sum += static_cast<Sum>(widen(column[i * p.stride]));
  static_cast<Sum*>(p.dbias)[v] += sum;
}

// --- sums over the scored tokens

template <class Acc>
struct SumsShared {
  double weighted[kScanThreads / kWarp], plain[kScanThreads / kWarp];
};

__device__ __forceinline__ double warp_total(double v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

template <class Acc>
__global__ void __launch_bounds__(kScanThreads) loss_sums_kernel(SumsParams p) {
  SumsShared<Acc>& shared = static_shared<SumsShared<Acc>>();
  const Acc *nll = static_cast<const Acc*>(p.nll), *weight = static_cast<const Acc*>(p.weight);
  const int64_t count = *p.scored.count;
  const bool too_many = count > p.scored.max_scored;
  double weighted = 0, plain = 0;
  for (int64_t i = threadIdx.x; i < count && !too_many; i += kScanThreads) {
    const int64_t token = p.scored.token[i];
    weighted += static_cast<double>(weight[token]) * static_cast<double>(nll[token]);
    plain += static_cast<double>(nll[token]);
  }
  weighted = warp_total(weighted);
  plain = warp_total(plain);
  if (threadIdx.x % kWarp == 0) {
    shared.weighted[threadIdx.x / kWarp] = weighted;
    shared.plain[threadIdx.x / kWarp] = plain;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  weighted = plain = too_many ? NAN : 0.0;
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    weighted += shared.weighted[w];
    plain += shared.plain[w];
  }
  *static_cast<Acc*>(p.weighted) = static_cast<Acc>(weighted);
  *static_cast<Acc*>(p.plain) = static_cast<Acc>(plain);
}

// --- from logits [B, L, V]

template <class T>
__global__ void __launch_bounds__(kLossThreads) logits_nll_kernel(LogitsParams p, bool aligned) {
  using Acc = WideT<T>;
  LossShared<Acc>& shared = static_shared<LossShared<Acc>>();
  const int64_t token = blockIdx.x, V = p.targets.V;
  RowLoss<Acc> loss{0, 0};
  if (is_scored(p.targets, token)) {  // uniform over the block
    const T* z = static_cast<const T*>(p.logits) + (token - p.targets.shift) * V;
    const Row<T, 0> row(z, V, aligned);
    loss = row_loss(row, z, V, p.targets.x0[token], {nullptr, static_cast<Acc>(p.targets.softcap)},
                    static_cast<Acc>(p.targets.label_smoothing), shared);
  }
  if (threadIdx.x == 0) {
    static_cast<Acc*>(p.nll)[token] = loss.nll;
    static_cast<Acc*>(p.lse)[token] = loss.lse;
  }
}

template <class T>
__global__ void __launch_bounds__(kLossThreads) logits_gradient_kernel(LogitsParams p, bool aligned) {
  using Acc = WideT<T>;
  const int64_t index = blockIdx.x, V = p.targets.V, token = index + p.targets.shift;
  const T* z = static_cast<const T*>(p.logits) + index * V;
  T* out = static_cast<T*>(p.dlogits) + index * V;
  const Row<T, 0> row(z, V, aligned);
  const bool last = index % p.targets.L == p.targets.L - 1;
  if ((p.targets.shift && last) || !is_scored(p.targets, token)) {
    row.write(out, [](Acc, int64_t) { return Acc(0); });
    return;
  }
  const Acc smoothing = static_cast<Acc>(p.targets.label_smoothing), uniform = smoothing / static_cast<Acc>(V);
  const LogitMap<T> map{nullptr, static_cast<Acc>(p.targets.softcap)};
  const int64_t target = p.targets.x0[token];
  const bool valid = target >= 0 && target < V;
  const Acc lse = static_cast<const Acc*>(p.lse)[token];
  const Acc scale = valid ? static_cast<const Acc*>(p.dnll)[token] : Acc(NAN);
  row.write(out,
            [&](Acc raw, int64_t v) { return logit_gradient<T>(raw, v, target, lse, scale, smoothing, uniform, map); });
}

// --- launches

template <class F>
cudaError_t with_element(Element element, F&& f) {
  switch (element) {
    case Element::kDouble:
      return f(double{});
    case Element::kHalf:
      return f(__half{});
    case Element::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

bool is_aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0 && row_bytes % kVectorBytes == 0;
}

// The launcher of whole-row copies, in the widest word that divides them.
template <class F>
cudaError_t with_copy_word(const ChunkParams& p, const void* a, const void* b, int element_size, F&& f) {
  const int64_t row_bytes = p.H * element_size;
  if (is_aligned(a, row_bytes) && is_aligned(b, row_bytes)) return f(uint4{}, row_bytes / 16);
  if (element_size == 8) return f(uint64_t{}, p.H);
  return element_size == 4 ? f(uint32_t{}, p.H) : f(uint16_t{}, p.H);
}

dim3 blocks(int64_t n) { return dim3(static_cast<unsigned>(n)); }

}  // namespace

cudaError_t launch_scored_tokens(const LossTargets& t, const ScoredTokens& out, void* nll, bool nll_is_double,
                                 cudaStream_t stream) {
  const auto run = [&](auto* wide_nll) {
    using Acc = std::remove_pointer_t<decltype(wide_nll)>;
    return launch(scored_tokens_kernel<Acc>, dim3(1), dim3(kScanThreads), 0, stream, t, out, wide_nll);
  };
  return nll_is_double ? run(static_cast<double*>(nll)) : run(static_cast<float*>(nll));
}

cudaError_t launch_gather_rows(const ChunkParams& p, int element_size, cudaStream_t stream) {
  return with_copy_word(p, p.hidden, p.rows, element_size, [&](auto word, int64_t words) {
    return launch(gather_rows_kernel<decltype(word)>, blocks(p.n), dim3(kCopyThreads), 0, stream, p, words);
  });
}

cudaError_t launch_scatter_rows(const ChunkParams& p, int element_size, cudaStream_t stream) {
  return with_copy_word(p, p.drows, p.dhidden, element_size, [&](auto word, int64_t words) {
    return launch(scatter_rows_kernel<decltype(word)>, blocks(p.n), dim3(kCopyThreads), 0, stream, p, words);
  });
}

cudaError_t launch_chunk_loss(const ChunkParams& p, Element element, bool with_grad, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = is_aligned(p.logits, p.stride * static_cast<int64_t>(sizeof(T)));
    const auto run = [&](auto kernel) {
      return launch(kernel, blocks(p.n), dim3(kLossThreads), 0, stream, p, aligned);
    };
    if (!with_grad) return run(chunk_nll_kernel<T>);
    if constexpr (sizeof(T) < 8) {
      switch (resident_vectors(p.targets.V, sizeof(T), aligned)) {
        case 4:
          return run(chunk_gradient_kernel<T, 4>);
        case 8:
          return run(chunk_gradient_kernel<T, 8>);
        case 16:
          return run(chunk_gradient_kernel<T, 16>);
        default:
          break;
      }
    }
    return run(chunk_gradient_kernel<T, 0>);
  });
}

cudaError_t launch_column_sums(const ChunkParams& p, Element element, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid = blocks(ceil_div(p.targets.V, kCopyThreads));
    if (p.dbias_is_double) return launch(column_sums_kernel<T, double>, grid, dim3(kCopyThreads), 0, stream, p);
    return launch(column_sums_kernel<T, float>, grid, dim3(kCopyThreads), 0, stream, p);
  });
}

cudaError_t launch_sums(const SumsParams& p, cudaStream_t stream) {
  if (p.is_double) return launch(loss_sums_kernel<double>, dim3(1), dim3(kScanThreads), 0, stream, p);
  return launch(loss_sums_kernel<float>, dim3(1), dim3(kScanThreads), 0, stream, p);
}

cudaError_t launch_logits_forward(const LogitsParams& p, Element element, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = is_aligned(p.logits, p.targets.V * static_cast<int64_t>(sizeof(T)));
    const dim3 grid = blocks(p.targets.B * p.targets.L);
    return launch(logits_nll_kernel<T>, grid, dim3(kLossThreads), 0, stream, p, aligned);
  });
}

cudaError_t launch_logits_backward(const LogitsParams& p, Element element, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const int64_t row_bytes = p.targets.V * static_cast<int64_t>(sizeof(T));
    const bool aligned = is_aligned(p.logits, row_bytes) && is_aligned(p.dlogits, row_bytes);
    const dim3 grid = blocks(p.targets.B * p.targets.L);
    return launch(logits_gradient_kernel<T>, grid, dim3(kLossThreads), 0, stream, p, aligned);
  });
}

}  // namespace diffullama
