// SPDX-License-Identifier: Apache-2.0
// unmask on CUDA: one launch, one block of 512 threads a sequence, 4 positions a thread at a time.
//   first pass : reads everything once, copies xt, makes the rank keys (kept in shared memory up to 8192 positions),
//                their smallest, largest and number
//   cut        : threshold and random need no more. quota and factor look for the first key that is not committed: the
//                range of keys is cut into 512 bins (counts by integer atomics, ranks by a scan over bins), the first
//                bin that may hold it becomes the range, until at most 64 keys are left to be ranked against each
//                other. Distinct confidences take one or two rounds, ties no more: the position is part of the key
//   last pass  : commits the keys up to the cut
//   traffic    : 30 B a position (xt, masked, token, confidence in; xt, committed out). Beyond 8192 positions every
//                pass reads 13 B again, from L2
//   bound      : latency of about a dozen barriers below some 100 sequences, memory above
//   int64      : offsets of sequences; positions and counts inside one are int
// Deterministic: counts, ranks and minima do not depend on the order of atomics. Not yet measured on GPU.
// ptxas spills 24 B on sm_100 of unmask_kernel, for occupancy; none on sm_90.
#include "unmask_kernel.h"

#include "../common/cuda_block.cuh"
#include "../common/launch.h"
#include "unmask_plan.h"

namespace diffullama {
namespace {

constexpr int kThreads = kUnmaskThreads, kWarps = kThreads / kWarp, kGroup = kUnmaskGroup;
constexpr int kBins = kThreads, kBinBits = 9;  // a bin a thread
constexpr int kLeaf = 64;                      // keys ranked against each other, by kThreads / kLeaf threads each
static_assert(kBins == 1 << kBinBits && kWarps <= kWarp && kThreads / kLeaf <= kWarp);

struct Sequence {
  const int64_t* xt;
  const bool* masked;
  const int64_t* token;
  const float* confidence;
  int64_t* xt_out;
  bool* committed;
  uint64_t seed, sample_index;
  uint32_t step;
  float amount;
  int L;
  Rule rule;
};

struct Keys {
  uint64_t key[kGroup];  // kIneligible past the end
};

// What a pass over the keys knows of them.
struct Extent {
  uint64_t low, high;  // kIneligible and 0 where there is none
  int eligible, masked;
};

// A range of keys, its ends included.
struct Range {
  uint64_t low, high;
  int rank, count;  // eligible keys below it, and inside

  __device__ bool holds(uint64_t key) const { return key - low <= high - low; }
};

struct UnmaskShared {
  Extent extent[kWarps];
  int count[kBins];
  uint32_t largest[kBins];  // rank bits of the last key of a bin
  int scan[kWarps];
  int bin;
  Range range;
  uint64_t leaf[kLeaf];
  int n_leaf;
  uint64_t stop[kWarps];
  int n_committed;
};

// Where a rule that goes by rank ends: at the first key, in order, for which this holds.
struct Stop {
  Rule rule;  // kQuota or kFactor
  float factor;
  int wanted;

  __device__ bool at(uint32_t descending_bits, int rank) const {
    return rule == Rule::kQuota ? rank >= wanted : !passes_factor(confidence_of(descending_bits), factor, rank);
  }
  // Whether one of `count` keys whose last has these bits may be it. Exact but for a negative factor, whose bound falls
  // with the rank.
  __device__ bool may_be_in(uint32_t last_bits, int first_rank, int count) const {
    return count > 0 && (at(last_bits, first_rank) || at(last_bits, first_rank + count - 1));
  }
};

__device__ __forceinline__ uint32_t bits_of(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

// --- passes over a sequence. A thread meets the same positions in each: what it keeps needs no barrier.

// The keys of four positions; adds their entries of masked to n_masked.
template <bool kVector>
__device__ __forceinline__ Keys make_keys(const Sequence& s, int first, int& n_masked) {
  bool masked[kGroup];
  int64_t token[kGroup];
  float confidence[kGroup];
  if constexpr (kVector) {
    const uchar4 m = __ldg(reinterpret_cast<const uchar4*>(s.masked + first));
    const longlong2 t0 = __ldg(reinterpret_cast<const longlong2*>(s.token + first));
    const longlong2 t1 = __ldg(reinterpret_cast<const longlong2*>(s.token + first + 2));
    const float4 c = __ldg(reinterpret_cast<const float4*>(s.confidence + first));
    masked[0] = m.x, masked[1] = m.y, masked[2] = m.z, masked[3] = m.w;
    token[0] = t0.x, token[1] = t0.y, token[2] = t1.x, token[3] = t1.y;
    confidence[0] = c.x, confidence[1] = c.y, confidence[2] = c.z, confidence[3] = c.w;
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const bool inside = first + k < s.L;
      masked[k] = inside && s.masked[first + k];
      token[k] = inside ? s.token[first + k] : -1;
      confidence[k] = inside ? s.confidence[first + k] : 0.0f;
    }
  }
  uint32_t bits[kGroup];
  if (s.rule == Rule::kRandom) {
    const uint64_t index4 = s.sample_index << 32 | static_cast<uint32_t>(first / kGroup);
    const Words4 words = philox(s.seed, index4, Tag::kUnmask, s.step);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) bits[k] = words.w[k];
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) bits[k] = confidence_bits(confidence[k]);
  }
  Keys keys;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const uint64_t key = rank_key(bits[k], static_cast<uint32_t>(first + k));
    keys.key[k] = is_eligible(masked[k], token[k], confidence[k]) ? key : kIneligible;
    n_masked += masked[k];
  }
  return keys;
}

template <bool kVector>
__device__ __forceinline__ void copy_xt(const Sequence& s, int first) {
  if constexpr (kVector) {
    const longlong2* const in = reinterpret_cast<const longlong2*>(s.xt + first);
    longlong2* const out = reinterpret_cast<longlong2*>(s.xt_out + first);
    const longlong2 a = __ldg(in), b = __ldg(in + 1);
    out[0] = a;
    out[1] = b;
  } else {
    for (int k = 0; k < kGroup && first + k < s.L; ++k) s.xt_out[first + k] = s.xt[first + k];
  }
}

// Key k of a thread's group; neighbours of a warp lie side by side, whatever the layout of positions.
__device__ __forceinline__ uint64_t& resident_key(uint64_t* keys, int first, int k) {
  return keys[first / (kGroup * kThreads) * (kGroup * kThreads) + k * kThreads + threadIdx.x];
}

// visit(first position, keys) for the groups of this thread.
template <bool kVector, bool kResident, class Visit>
__device__ __forceinline__ void for_each_group(const Sequence& s, uint64_t* keys, Visit visit) {
  for (int first = kGroup * threadIdx.x; first < s.L; first += kGroup * kThreads) {
    Keys group;
    if constexpr (kResident) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) group.key[k] = resident_key(keys, first, k);
    } else {
      int ignored = 0;
      group = make_keys<kVector>(s, first, ignored);
    }
    visit(first, group);
  }
}

// --- reductions

__device__ Extent warp_extent(Extent e) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint64_t low = __shfl_xor_sync(kAllLanes, e.low, offset), high = __shfl_xor_sync(kAllLanes, e.high, offset);
    e.low = low < e.low ? low : e.low;
    e.high = high > e.high ? high : e.high;
  }
  e.eligible = __reduce_add_sync(kAllLanes, e.eligible);
  e.masked = __reduce_add_sync(kAllLanes, e.masked);
  return e;
}

// Over the block, to every thread; the partial results are used once.
__device__ Extent block_extent(Extent e, Extent* partial) {
  e = warp_extent(e);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) partial[threadIdx.x / kWarp] = e;
  __syncthreads();
  return warp_extent(lane < kWarps ? partial[lane] : Extent{kIneligible, 0, 0, 0});
}

__device__ uint64_t block_smallest(uint64_t v, uint64_t* partial) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, v, offset);
    v = other < v ? other : v;
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = v;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) v = partial[w] < v ? partial[w] : v;
  return v;
}

// --- the cut

// Replaces the range by the first of 512 parts of it in which the stop may be; false where it is in none.
template <bool kVector, bool kResident>
__device__ bool narrow(const Sequence& s, uint64_t* keys, const Stop& stop, Range& range, UnmaskShared& shared) {
  const int bits = 64 - __clzll(static_cast<long long>(range.high - range.low));
  const int shift = bits > kBinBits ? bits - kBinBits : 0;
  __syncthreads();  // what the last round left may still be read
  shared.count[threadIdx.x] = 0;
  shared.largest[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.bin = kBins;
  __syncthreads();
  for_each_group<kVector, kResident>(s, keys, [&](int, const Keys& group) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (!range.holds(group.key[k])) continue;
      const int bin = static_cast<int>((group.key[k] - range.low) >> shift);
      atomicAdd(&shared.count[bin], 1);
      if (stop.rule == Rule::kFactor) atomicMax(&shared.largest[bin], bits_of(group.key[k]));
    }
  });
  __syncthreads();
  const int count = shared.count[threadIdx.x];
  int total;
  const int rank = range.rank + block_exclusive_scan<kThreads>(count, shared.scan, total);
  const uint32_t candidates = __ballot_sync(kAllLanes, stop.may_be_in(shared.largest[threadIdx.x], rank, count));
  if (threadIdx.x % kWarp == 0 && candidates != 0) {
    atomicMin(&shared.bin, static_cast<int>(threadIdx.x) + __ffs(static_cast<int>(candidates)) - 1);
  }
  __syncthreads();
  if (shared.bin == kBins) return false;
  if (static_cast<int>(threadIdx.x) == shared.bin) {
    const uint64_t low = range.low + (uint64_t{threadIdx.x} << shift), width = (uint64_t{1} << shift) - 1;
    shared.range = {low, range.high - low < width ? range.high : low + width, rank, count};
  }
  __syncthreads();
  range = shared.range;
  return true;
}

// The stop among the at most kLeaf keys of the range, or kIneligible.
template <bool kVector, bool kResident>
__device__ uint64_t stop_in(const Sequence& s, uint64_t* keys, const Stop& stop, const Range& range,
                            UnmaskShared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.n_leaf = 0;
  __syncthreads();
  for_each_group<kVector, kResident>(s, keys, [&](int, const Keys& group) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (range.holds(group.key[k])) shared.leaf[atomicAdd(&shared.n_leaf, 1)] = group.key[k];
    }
  });
  __syncthreads();
  constexpr int kParts = kThreads / kLeaf;
  const int entry = threadIdx.x / kParts, part = threadIdx.x % kParts;
  const uint64_t key = entry < range.count ? shared.leaf[entry] : kIneligible;
  int below = 0;
  for (int i = part; i < range.count; i += kParts) below += shared.leaf[i] < key;
  for (int offset = kParts / 2; offset > 0; offset /= 2) below += __shfl_xor_sync(kAllLanes, below, offset);
  const bool stops = entry < range.count && stop.at(bits_of(key), range.rank + below);
  return block_smallest(stops ? key : kIneligible, shared.stop);
}

// All keys up to the result come before the stop; the first of all always does.
template <bool kVector, bool kResident>
__device__ uint64_t cut_by_rank(const Sequence& s, uint64_t* keys, const Stop& stop, const Range& all,
                                UnmaskShared& shared) {
  Range range = all;
  while (true) {
    bool inside = true;
    while (inside && range.count > kLeaf) inside = narrow<kVector, kResident>(s, keys, stop, range, shared);
    const uint64_t found = inside ? stop_in<kVector, kResident>(s, keys, stop, range, shared) : kIneligible;
    if (found != kIneligible) return found - 1 > all.low ? found - 1 : all.low;
    const int rank = range.rank + range.count;
    if (rank == all.count) return kIneligible - 1;
    range = {range.high + 1, all.high, rank, all.count - rank};  // a negative factor only: it may be further on
  }
}

template <bool kVector, bool kResident>
__device__ uint64_t cut_of(const Sequence& s, uint64_t* keys, const Extent& extent, UnmaskShared& shared) {
  if (extent.eligible == 0) return 0;  // below every ineligible key
  if (s.rule == Rule::kThreshold || s.rule == Rule::kRandom) {
    const uint64_t cut = s.rule == Rule::kRandom ? random_cut(s.amount) : threshold_cut(s.amount);
    return cut > extent.low ? cut : extent.low;
  }
  const Stop stop{s.rule, s.amount, static_cast<int>(quota_count(s.amount, extent.eligible))};
  if (s.rule == Rule::kQuota && stop.wanted == extent.eligible) return kIneligible - 1;
  return cut_by_rank<kVector, kResident>(s, keys, stop, {extent.low, extent.high, 0, extent.eligible}, shared);
}

// --- the kernel

template <bool kVector>
__device__ __forceinline__ int commit(const Sequence& s, int first, const Keys& group, uint64_t cut) {
  bool hit[kGroup];
  int n = 0;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    hit[k] = group.key[k] <= cut;
    n += hit[k];
    if (hit[k]) s.xt_out[first + k] = s.token[first + k];  // over this thread's own copy
  }
  if constexpr (kVector) {
    *reinterpret_cast<uchar4*>(s.committed + first) = make_uchar4(hit[0], hit[1], hit[2], hit[3]);
  } else {
    for (int k = 0; k < kGroup && first + k < s.L; ++k) s.committed[first + k] = hit[k];
  }
  return n;
}

template <bool kVector, bool kResident>
__global__ void __launch_bounds__(kThreads) unmask_kernel(UnmaskParams p) {
  UnmaskShared& shared = static_shared<UnmaskShared>();
  uint64_t* keys = nullptr;
  if constexpr (kResident) keys = dynamic_shared<uint64_t>();
  const int64_t b = blockIdx.x, row = b * p.L;
  const Sequence s{p.xt + row,
                   p.masked + row,
                   p.token + row,
                   p.confidence + row,
                   p.xt_out + row,
                   p.committed + row,
                   static_cast<uint64_t>(p.seed[0]),
                   static_cast<uint64_t>(p.sample_index[b]),
                   static_cast<uint32_t>(p.step[0]),
                   p.amount[b],
                   static_cast<int>(p.L),
                   p.rule};

  Extent extent{kIneligible, 0, 0, 0};
  for (int first = kGroup * threadIdx.x; first < s.L; first += kGroup * kThreads) {
    const Keys group = make_keys<kVector>(s, first, extent.masked);
    copy_xt<kVector>(s, first);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const uint64_t key = group.key[k];
      if constexpr (kResident) resident_key(keys, first, k) = key;
      extent.low = key < extent.low ? key : extent.low;
      extent.high = key != kIneligible && key > extent.high ? key : extent.high;
      extent.eligible += key != kIneligible;
    }
  }
  if (threadIdx.x == 0) shared.n_committed = 0;
  extent = block_extent(extent, shared.extent);

  const uint64_t cut = cut_of<kVector, kResident>(s, keys, extent, shared);
  int n = 0;
  for_each_group<kVector, kResident>(s, keys,
                                     [&](int first, const Keys& group) { n += commit<kVector>(s, first, group, cut); });
  n = __reduce_add_sync(kAllLanes, n);
  if (threadIdx.x % kWarp == 0) atomicAdd(&shared.n_committed, n);
  __syncthreads();
  if (threadIdx.x == 0) p.remaining[b] = extent.masked - shared.n_committed;
}

bool is_aligned(const void* pointer, uintptr_t to) { return reinterpret_cast<uintptr_t>(pointer) % to == 0; }

}  // namespace

cudaError_t launch_unmask(const UnmaskParams& p, cudaStream_t stream) {
  const bool vector = p.L % kGroup == 0 && is_aligned(p.xt, 16) && is_aligned(p.token, 16) &&
                      is_aligned(p.confidence, 16) && is_aligned(p.xt_out, 16) && is_aligned(p.masked, 4) &&
                      is_aligned(p.committed, 4);
  const KernelPlan plan = plan_unmask(p.B, p.L);
  const auto run = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(plan.block),
                  static_cast<size_t>(plan.shared_bytes), stream, p);
  };
  if (p.L <= kUnmaskResident) return run(vector ? unmask_kernel<true, true> : unmask_kernel<false, true>);
  return run(vector ? unmask_kernel<true, false> : unmask_kernel<false, false>);
}

}  // namespace diffullama
