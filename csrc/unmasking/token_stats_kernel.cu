// SPDX-License-Identifier: Apache-2.0
// token_stats on CUDA, one launch. A row belongs to one block of up to 8 warps, or to a cluster of 2, 4 or 8.
//   load    : the slice goes to shared memory once, in its own format (cp.async; rows that start off a 16-byte boundary
//             through registers). Where no cluster holds a row, every pass reads it again, from L2
//   passes  : largest logit | sums of exp, entropy and masses, the masses in tiles of 1024 entries | the draw: block,
//             warp, tile, lane, chunk, entry. Truncated draws find their cut in between (token_stats_cut.cuh)
//   traffic : N * V logits read once; 48 B a row besides
//   bound   : HBM for greedy and temperature 1; 2 ex2 a logit (90 % of HBM at 16 bits) at other temperatures;
//             instruction issue for top-p. Arithmetic in docs/kernels/unmasking.md; not yet measured on GPU
//   order   : every sum is of integers, or in a fixed order over 8 entries that start at a multiple of 8: a row's
//             results depend neither on its neighbours nor on how many blocks share it
//   int64   : row offsets; N * V may pass 2^31
#include "token_stats_kernel.h"

#include "../common/launch.h"
#include "token_stats_cut.cuh"
#include "token_stats_draw.cuh"
#include "token_stats_sums.cuh"

namespace diffullama {
namespace {

using namespace token_stats;  // NOLINT: this file's own parts

constexpr int kThreads = kTokenStatsWarps * kWarp;
constexpr int kBlocksPerSm = 4, kTruncatedBlocksPerSm = 3;  // that the registers leave room for

static_assert(sizeof(CutShared) + sizeof(RowShared) <= kTokenStatsStaticBytes, "the plan counts on less");

// --- a row from start to end

// What the row's end needs from global memory, fetched first.
template <class Row>
__device__ void fetch_row_inputs(const Row& c) {
  if (threadIdx.x == 0) {
    const auto seed = static_cast<uint64_t>(*c.p.seed), index = static_cast<uint64_t>(c.p.row_index[c.n]);
    c.shared.uniform62 = row_uniform62(seed, index, static_cast<uint32_t>(*c.p.step));
  }
  if (threadIdx.x == 1) {
    const int64_t current = c.p.current == nullptr ? -1 : c.p.current[c.n];
    const bool given = current >= 0 && current < c.p.V;
    c.shared.current = !given ? NAN : current == c.p.forbid ? -INFINITY : static_cast<float>(c.slice.row.x[current]);
  }
}

template <class T, bool kResident>
__device__ Context<T, kResident> context_of(const TokenStatsParams& p, RowShared& shared) {
  const Team team{cluster_rank(), cluster_size(), static_cast<int>(blockDim.x) / kWarp,
                  static_cast<int>(threadIdx.x) / kWarp, static_cast<int>(threadIdx.x) % kWarp};
  const int64_t n = p.first_row + blockIdx.x / team.size;
  auto* memory = dynamic_shared<unsigned char>();
  Slice<T, kResident> slice{};
  slice.row = {static_cast<const T*>(p.logits) + n * p.row_stride, p.V};
  slice.resident = reinterpret_cast<T*>(memory);
  slice.begin = team.rank * p.layout.slice;
  const int left = p.V - slice.begin, taken = left < p.layout.slice ? left : p.layout.slice;
  slice.chunks = taken > 0 ? (taken + kChunk - 1) / kChunk : 0;
  slice.forbid = p.forbid;
  const int first = team.warp * p.layout.segment, end = min(first + p.layout.segment, slice.chunks);
  auto* tile_sums = reinterpret_cast<uint64_t*>(memory + p.layout.tile_sums) + team.warp * p.layout.tiles;
  return {p, team, n, slice, {first + team.lane, end}, shared, tile_sums};
}

// Finds the cut between the two passes over the row; returns it with tile_sums and WarpRecord::kept of the kept
// entries.
template <class T, bool kResident>
__device__ uint64_t truncate(const Context<T, kResident>& c, const Scales& scales, CutShared& s) {
  const TokenStatsParams& p = c.p;
  const bool by_count = p.top_k > 0 && p.top_k < p.V;
  const uint32_t low_bits = c.team.largest(c.shared.low);
  float lowest = low_bits == 0 ? 0.0f : fmaxf(scales.draw_log2(value_of_bits(low_bits)), kLowest);
  lowest = lowest > -1e-20f ? 0.0f : lowest;
  count_sample(c, scales, lowest, s.estimate);
  c.team.sync();
  if (c.team.warp == 0) {
    sum_sample(c, lowest, s.estimate);
    if (by_count) {
      open_by_count(c, scales, s);
    } else {
      choose_pivot<T>(c, scales, s);
    }
  }
  __syncthreads();
  add_segment<Draw::kTruncated>(c, scales, s.pivot, !by_count, c.shared.warps[c.team.warp]);
  c.team.sync();
  if (!by_count) {
    if (c.team.warp == 0) open_by_mass<T>(c, scales, s);
    __syncthreads();
  }

  auto* memory = dynamic_shared<unsigned char>();
  EntryList list{reinterpret_cast<uint16_t*>(memory + p.layout.lists) + c.team.warp * kListed,
                 reinterpret_cast<int*>(memory + p.layout.list_ends) + c.team.warp * p.layout.tiles, 0};
  int pass = 0;
  for (bool counting = by_count;; counting = false) {
    find_cut(c, {counting, static_cast<uint64_t>(p.top_k), p.top_p}, scales, s, list, pass);
    if (!counting || p.top_p >= 1.0) break;
    __syncthreads();
    if (threadIdx.x == 0) open_up_to_cut(s.search, scales.top);  // top-p of what top-k left
    __syncthreads();
  }
  const uint64_t cut = s.search.cut;
  const uint64_t kept = keep_up_to(c, scales, s.pivot, s.search.covered, cut, list);
  if (c.team.lane == 0) c.shared.warps[c.team.warp].kept = kept;
  c.team.sync();
  return cut;
}

template <Draw kDraw, class T, bool kResident>
__device__ void valid_row(const Context<T, kResident>& c, uint32_t lane_bits, uint32_t top_bits) {
  const Scales scales = scales_of(value_of_bits(top_bits), c.p.temperature);
  WarpRecord& record = c.shared.warps[c.team.warp];
  find_top(c, lane_bits, top_bits, record);
  uint64_t cut = 0;
  if constexpr (kDraw == Draw::kTruncated) {
    cut = truncate(c, scales, static_shared<CutShared>());
  } else {
    add_segment<kDraw>(c, scales, 0.0f, true, record);
    c.team.sync();
  }
  if (c.team.warp != 0) return;
  Drawn drawn{};
  if constexpr (kDraw == Draw::kGreedy) {
    if (c.team.rank != 0) return;
  } else {
    if (!draw_token<kDraw>(c, scales, cut, drawn)) return;
  }
  write_row<kDraw>(c, scales.top, drawn);
}

template <Draw kDraw, class T, bool kResident>
__device__ __forceinline__ void row_stats(const TokenStatsParams& p) {
  const Context<T, kResident> c = context_of<T, kResident>(p, static_shared<RowShared>());
  fetch_row_inputs(c);
  if constexpr (kResident) c.slice.stage(c.own);
  const uint32_t lane_bits = lane_largest(c), warp_bits = __reduce_min_sync(kAllLanes, lane_bits);
  if (c.team.lane == 0) c.shared.top[c.team.warp] = warp_bits;
  if constexpr (kDraw == Draw::kTruncated) {
    const uint32_t low = sampled_low(c);
    if (c.team.lane == 0) c.shared.low[c.team.warp] = low;
    clear(static_shared<CutShared>());
  }
  c.team.sync();
  const uint32_t top_bits = c.team.smallest(c.shared.top);
  const float top = value_of_bits(top_bits);
  if (top >= -FLT_MAX && top <= FLT_MAX) {
    valid_row<kDraw>(c, lane_bits, top_bits);
  } else if (c.team.rank == 0 && threadIdx.x == 0) {
    write_invalid(p, c.n);
  }
  c.team.leave();
}

template <class T, bool kResident>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) token_stats_greedy_kernel(TokenStatsParams p) {
  row_stats<Draw::kGreedy, T, kResident>(p);
}

template <class T, bool kResident>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) token_stats_whole_kernel(TokenStatsParams p) {
  row_stats<Draw::kWhole, T, kResident>(p);
}

template <class T, bool kResident>
__global__ void __launch_bounds__(kThreads, kTruncatedBlocksPerSm) token_stats_truncated_kernel(TokenStatsParams p) {
  row_stats<Draw::kTruncated, T, kResident>(p);
}

// --- launching

template <class T, bool kResident>
cudaError_t launch_rows(TokenStatsParams p, Draw draw, const TokenStatsPlan& plan, cudaStream_t stream) {
  const auto kernel = draw == Draw::kGreedy  ? &token_stats_greedy_kernel<T, kResident>
                      : draw == Draw::kWhole ? &token_stats_whole_kernel<T, kResident>
                                             : &token_stats_truncated_kernel<T, kResident>;
  p.layout = plan.layout;
  const int cluster = plan.launch.cluster;
  const int64_t rows_at_once = INT32_MAX / cluster;
  for (p.first_row = 0; p.first_row < p.N; p.first_row += rows_at_once) {
    const int64_t rows = p.N - p.first_row < rows_at_once ? p.N - p.first_row : rows_at_once;
    const LaunchOptions options{static_cast<unsigned>(cluster), false};
    const cudaError_t error = launch_with(options, kernel, dim3(static_cast<unsigned>(rows * cluster)),
                                          dim3(static_cast<unsigned>(plan.launch.block)),
                                          static_cast<size_t>(plan.launch.shared_bytes), stream, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t launch_format(const TokenStatsParams& p, Draw draw, cudaStream_t stream) {
  DeviceLimits device;
  const cudaError_t error = device_limits(&token_stats_greedy_kernel<T, true>, device);
  if (error != cudaSuccess) return error;
  const TokenStatsPlan plan = plan_token_stats(p.N, p.V, sizeof(T), draw, device);
  return plan.resident ? launch_rows<T, true>(p, draw, plan, stream) : launch_rows<T, false>(p, draw, plan, stream);
}

}  // namespace

cudaError_t launch_token_stats(TokenStatsParams p, LogitFormat format, Draw draw, cudaStream_t stream) {
  switch (format) {
    case LogitFormat::kFloat:
      return launch_format<float>(p, draw, stream);
    case LogitFormat::kHalf:
      return launch_format<__half>(p, draw, stream);
    default:
      return launch_format<__nv_bfloat16>(p, draw, stream);
  }
}

}  // namespace diffullama
