// SPDX-License-Identifier: Apache-2.0
// token_stats on CUDA, one launch. A row belongs to one block of up to 8 warps, or to a cluster of 2, 4 or 8.
//   load    : the slice goes to shared memory once, in its own format (cp.async; rows that start off a 16-byte boundary
//             through registers). Where no cluster holds a row, every pass reads it again, from L2
//   passes  : largest logit | sums of exp, entropy and masses, the masses in tiles of 1024 entries | the draw: block,
//             warp, tile, lane, chunk, entry. Truncated draws find their cut in between (token_stats_cut.cuh)
//   traffic : N * V logits read once; 48 B a row besides
//   bound   : HBM for greedy and temperature 1; 2 ex2 a logit (90 % of HBM at 16 bits) at other temperatures;
//   instruction
//             issue for top-p. Arithmetic in docs/kernels/unmasking.md; not yet measured on GPU
//   order   : every sum is of integers, or in a fixed order over 8 entries that start at a multiple of 8: a row's
//   results
//             depend neither on its neighbours nor on how many blocks share it
//   int64   : row offsets; N * V may pass 2^31
#include "token_stats_kernel.h"

#include <climits>

#include "../common/launch.h"
#include "token_stats_cut.cuh"

namespace diffullama {
namespace {

using namespace token_stats;  // NOLINT: this file's own parts

constexpr int kThreads = kTokenStatsWarps * kWarp;
constexpr int kBlocksPerSm = 4, kTruncatedBlocksPerSm = 3;  // that the registers leave room for

static_assert(sizeof(CutShared) + sizeof(RowShared) <= kTokenStatsStaticBytes, "the plan counts on less");

// --- the start: what the row's end needs from global memory, and the largest logit

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

// Rank bits of the largest of the lane's entries.
template <class T, bool kResident>
__device__ uint32_t lane_largest(const Context<T, kResident>& c) {
  Largest<T> largest;
  for (int chunk = c.own.first; chunk < c.own.end; chunk += kWarp) largest.add(c.slice.chunk(chunk));
  return largest.bits();
}

// Where the row's largest logit is in the warp's segment, and the largest after it. Lanes that hold it are few: all
// lanes go through the chunks of one after another.
template <class T, bool kResident>
__device__ void find_top(const Context<T, kResident>& c, uint32_t lane_bits, uint32_t top_bits, WarpRecord& record) {
  const float top = value_of_bits(top_bits);
  float second = -INFINITY;
  int first = INT_MAX, n = 0;
  for (unsigned holders = __ballot_sync(kAllLanes, lane_bits == top_bits); holders != 0; holders &= holders - 1) {
    const int holder = c.own.first - c.team.lane + __ffs(static_cast<int>(holders)) - 1;
    for (int chunk = holder + kWarp * c.team.lane; chunk < c.own.end; chunk += kWarp * kWarp) {
      float x[kChunk];
      unpack(c.slice.chunk(chunk), x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const bool is_top = x[i] == top;
        n += is_top;
        first = is_top ? min(first, c.slice.begin + kChunk * chunk + i) : first;
        second = is_top ? second : fmaxf(second, x[i]);
      }
    }
  }
  const uint32_t others = lane_bits == top_bits ? ~0u : lane_bits;
  const uint32_t second_bits = __reduce_min_sync(kAllLanes, min(others, rank_bits(second)));
  first = __reduce_min_sync(kAllLanes, first);
  n = __reduce_add_sync(kAllLanes, n);
  if (c.team.lane != 0) return;
  record.first_top = first;
  record.n_top = n;
  record.second = second_bits;
}

// --- the pass over the whole row

struct SegmentSums {
  MassSum weight, entropy, drawn, kept;
};

// f(0) + f(2) + ... plus f(1) + f(3) + ...: one order for every launch.
template <class F>
__device__ __forceinline__ float chunk_sum(F&& f) {
  float even = f(0), odd = f(1);
#pragma unroll
  for (int i = 2; i < kChunk; i += 2) {
    even += f(i);
    odd += f(i + 1);
  }
  return even + odd;
}

// (top - x) exp(x - top) over a chunk; an entry of -inf adds 0.
__device__ __forceinline__ float chunk_entropy(const float (&gap)[kChunk], const float (&weight)[kChunk]) {
  const auto sum = [&](auto&& factor) {
    float even = factor(0) * weight[0], odd = factor(1) * weight[1];
#pragma unroll
    for (int i = 2; i < kChunk; i += 2) {
      even = fmaf(factor(i), weight[i], even);
      odd = fmaf(factor(i + 1), weight[i + 1], odd);
    }
    return even + odd;
  };
  const float entropy = sum([&](int i) { return gap[i]; });
  if (entropy == entropy) return entropy;
  return sum([&](int i) { return weight[i] > 0 ? gap[i] : 0.0f; });  // inf * 0, seldom
}

// Truncated draws keep what is above the pivot for now.
template <Draw kDraw, class T>
__device__ __forceinline__ void add_chunk(const Chunk<T>& chunk, const Scales& scales, float pivot, bool draws,
                                          SegmentSums& sums) {
  float x[kChunk], gap[kChunk], weight[kChunk];
  unpack(chunk, x);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    gap[i] = scales.top - x[i];
    weight[i] = exp2_approx(gap[i] * scales.stats);
  }
  float total = chunk_sum([&](int i) { return weight[i]; });
  sums.weight.add(total);
  sums.entropy.add(chunk_entropy(gap, weight));
  if constexpr (kDraw == Draw::kGreedy) return;
  if (!draws) return;
  if (scales.tempered()) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) weight[i] = exp2_approx(gap[i] * scales.draw);
    if constexpr (kDraw == Draw::kTruncated) total = chunk_sum([&](int i) { return weight[i]; });
  }
  if constexpr (kDraw == Draw::kTruncated) sums.drawn.add(total);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (kDraw == Draw::kWhole || x[i] > pivot) sums.kept.add(weight[i]);
  }
}

// A lane's sums over 8 tiles are below 256: they are exact so long.
constexpr int kExactTiles = 8;

template <Draw kDraw, class T, bool kResident>
__device__ void add_segment(const Context<T, kResident>& c, const Scales& scales, float pivot, bool draws,
                            WarpRecord& record) {
  uint64_t weight = 0, entropy = 0, drawn = 0, kept = 0;
  for (int first_tile = 0; first_tile < c.p.layout.tiles; first_tile += kExactTiles) {
    SegmentSums sums;
    const int end_tile = min(first_tile + kExactTiles, c.p.layout.tiles);
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; ++tile) {
      sums.kept = MassSum();
#pragma unroll 2
      for (int k = 0; k < kSteps; ++k) {
        if (c.chunk_of(tile, k) >= c.own.end) break;
        add_chunk<kDraw>(c.slice.chunk(c.chunk_of(tile, k)), scales, pivot, draws, sums);
      }
      if constexpr (kDraw != Draw::kGreedy) {
        const uint64_t tile_mass = warp_total_of_tiles(sums.kept.mass());
        if (c.team.lane == 0) c.tile_sums[tile] = tile_mass;
        kept += tile_mass;
      }
    }
    weight += sums.weight.mass();
    entropy += sums.entropy.mass();
    if constexpr (kDraw == Draw::kTruncated) drawn += sums.drawn.mass();
  }
  weight = warp_total(weight);
  entropy = warp_total(entropy);
  if constexpr (kDraw == Draw::kTruncated) drawn = warp_total(drawn);
  if (c.team.lane != 0) return;
  record.weight = weight;
  record.entropy = entropy;
  record.drawn = drawn;
  record.kept = kept;
}

// --- the draw, by the first warp of every block

struct Drawn {
  int token;  // entry of the row
  float x;
  float prob;  // of the draw
};

// The entry drawn, in every lane of the block that holds it; false in the others.
template <Draw kDraw, class T, bool kResident>
__device__ bool draw_token(const Context<T, kResident>& c, const Scales& scales, uint64_t cut, Drawn& out) {
  constexpr int kRounds = kTokenStatsMaxCluster * kTokenStatsWarps / kWarp;
  uint64_t kept[kRounds], sum = 0;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int slot = r * kWarp + c.team.lane;
    sum += kept[r] = c.team.is_used(slot) ? c.team.of_slot(c.shared.warps, slot).kept : 0;
  }
  const uint64_t total = warp_total(sum);
  uint64_t target = draw_target(c.shared.uniform62, total);
  int owner = 0;
#pragma unroll
  for (int r = 0, found = kWarp; r < kRounds; ++r) {
    if (found == kWarp) owner = r * kWarp + (found = descend(kept[r], target));
  }
  if (owner / kTokenStatsWarps != c.team.rank) return false;
  const int warp = owner % kTokenStatsWarps, n_tiles = c.p.layout.tiles;
  const uint64_t* tile_sums = c.tile_sums + (warp - c.team.warp) * n_tiles;
  const int tile = descend(c.team.lane < n_tiles ? tile_sums[c.team.lane] : 0, target);

  const auto mass_at = [&](float x, int i) {
    return kDraw == Draw::kTruncated && rank_of(x, i) > cut ? uint64_t{0} : mass_of(scales.draw_weight(x));
  };
  const int begin = warp * c.p.layout.segment + tile * kTileChunks;
  const int end = min(min(begin + kTileChunks, (warp + 1) * c.p.layout.segment), c.slice.chunks);
  uint64_t lane_mass = 0, masses[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {  // consecutive chunks here, as the order counts
    const int chunk = begin + kSteps * c.team.lane + k;
    masses[k] = 0;
    if (chunk < end) {
      float x[kChunk];
      unpack(c.slice.chunk(chunk), x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) masses[k] += mass_at(x[i], c.slice.begin + kChunk * chunk + i);
    }
    lane_mass += masses[k];
  }
  const int lane = descend(lane_mass, target);
  int step = 0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint64_t mass = __shfl_sync(kAllLanes, masses[k], lane);
    if (step == k && target >= mass) {
      target -= mass;
      ++step;
    }
  }
  const int entry = kChunk * (begin + kSteps * lane + step);
  const bool in_chunk = c.team.lane < kChunk;
  const float x = in_chunk ? c.slice.value(entry + c.team.lane) : -INFINITY;
  const uint64_t mass = in_chunk ? mass_at(x, c.slice.begin + entry + c.team.lane) : 0;
  const int place = descend(mass, target);
  out.token = c.slice.begin + entry + place;
  out.x = __shfl_sync(kAllLanes, x, place);
  const uint64_t share = __shfl_sync(kAllLanes, mass, place);
  out.prob = static_cast<float>(static_cast<double>(share) / static_cast<double>(total));
  return true;
}

// --- the results of a row

__device__ void write_invalid(const TokenStatsParams& p, int64_t n) {
  p.token[n] = -1;
  for (int k = 0; k < 8; ++k) p.values[k * p.N + n] = NAN;
}

// By one warp, after the sums of all are there; greedy takes the token here.
template <Draw kDraw, class T, bool kResident>
__device__ void write_row(const Context<T, kResident>& c, float top, Drawn drawn) {
  constexpr double kUnit = 1.0 / static_cast<double>(uint64_t{1} << kMassBits);
  const double sum = kUnit * static_cast<double>(c.team.total(c.shared.warps, &WarpRecord::weight));
  const double entropy = kUnit * static_cast<double>(c.team.total(c.shared.warps, &WarpRecord::entropy));
  uint32_t second = ~0u;
  int first = INT_MAX, n_top = 0;
#pragma unroll 1
  for (int slot = c.team.lane; slot < c.team.n_slots(); slot += kWarp) {
    if (!c.team.is_used(slot)) continue;
    const WarpRecord& record = c.team.of_slot(c.shared.warps, slot);
    second = min(second, record.second);
    first = min(first, record.first_top);
    n_top += record.n_top;
  }
  second = __reduce_min_sync(kAllLanes, second);
  first = __reduce_min_sync(kAllLanes, first);
  n_top = __reduce_add_sync(kAllLanes, n_top);
  if (c.team.lane != 0) return;
  if constexpr (kDraw == Draw::kGreedy) drawn = {first, top, 1.0f};
  const float x2 = n_top > 1 ? top : value_of_bits(second);
  const float inverse = static_cast<float>(1.0 / sum), log_sum = logf(static_cast<float>(sum));
  const float values[8] = {expf(drawn.x - top) * inverse,
                           drawn.prob,
                           inverse,
                           expf(x2 - top) * inverse,
                           top - x2,
                           log_sum + static_cast<float>(entropy / sum),
                           top + log_sum,
                           expf(c.shared.current - top) * inverse};
  c.p.token[c.n] = drawn.token;
#pragma unroll
  for (int k = 0; k < 8; ++k) c.p.values[k * c.p.N + c.n] = values[k];
}

// --- a row from start to end

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
