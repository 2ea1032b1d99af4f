// SPDX-License-Identifier: Apache-2.0
// The cut of top-k and top-p in token_stats: radix selection over ranks (value, then index).
//
// A pass adds the weights (1, or the mass) of the entries ranked in a window to 128 bins of shared memory, and finds
// the bin where the kept prefix ends: the next window. When at most 32 entries are left, one warp orders them. What
// keeps a pass off most of the row is where the first window lies: a sample of the row (one chunk a lane) tells about
// where the cut is, the pass over the whole row sums what is above that pivot exactly, and the window reaches from the
// pivot to a little past where the cut should be. A window that misses the cut is followed by all that is left on that
// side. So the sample decides how long it takes and nothing else. Entries seen in a window are remembered for the later
// passes. All sums are of integers: neither the order of atomics nor the number of blocks shows in the cut.
#pragma once

#include "token_stats_estimate.cuh"
#include "token_stats_list.cuh"

namespace diffullama::token_stats {

constexpr int kBinBits = 7;
static_assert(kBins == 1 << kBinBits);

struct Finalist {
  uint64_t rank, weight;
};

// One pass of one block.
struct Tally {
  unsigned bins[kBins][2];  // low and high half
  Finalist finalists[kWarp];
  int n;  // entries counted; finalists while they fit
};

struct Search {
  uint64_t first, last;  // ranks of the window
  uint64_t before;       // weight ranked before it; before its end if from_end
  uint64_t total;        // that top-p is of; 0 is all up to the window's end
  uint64_t cut;          // the last rank kept, once found
  float lo, hi;          // the window's entries are in [lo, hi]
  bool from_end, fresh, covered, found;
};

struct CutShared {
  Tally tallies[2];  // in turn: other blocks may read one while the next fills
  Estimate estimate;
  Search search;
  float pivot, pivot_position;
};

struct CutRule {
  bool by_count;  // top-k; else top-p of `total`
  uint64_t top_k;
  double top_p;

  __device__ __forceinline__ bool keeps(uint64_t before, uint64_t total) const {
    return by_count ? before < top_k : in_nucleus(before, total, top_p);
  }
};

__device__ __forceinline__ uint64_t end_rank() { return (uint64_t{rank_bits(-INFINITY)} << kIndexBits) - 1; }

__device__ __forceinline__ void clear(Tally& tally) {
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) tally.bins[b][0] = tally.bins[b][1] = 0;
  if (threadIdx.x == 0) tally.n = 0;
}

__device__ __forceinline__ void clear(CutShared& s) {
  clear(s.tallies[0]);
  clear(s.estimate);
}

// Room in the lists, with some to spare.
__device__ __forceinline__ float listable(const Team& team) {
  return 0.5f * kListed * static_cast<float>(team.n_warps());
}

// The logit above which the pass over the row sums masses: about where top-p cuts, or lower where fewer entries than
// fit the lists are above that. By one warp.
template <class T, bool kResident>
__device__ void choose_pivot(const Context<T, kResident>& c, const Scales& scales, CutShared& s) {
  const Estimate& e = s.estimate;
  const float all = e.weights[kBins - 1] + 1.0f;  // the largest entry is seldom in the sample
  const float by_weight = position_of(e.weights, static_cast<float>(c.p.top_p) * all - 1.0f);
  const float position = fmaxf(by_weight, position_of(e.entries, listable(c.team)));
  if (c.team.lane != 0) return;
  s.pivot_position = position;
  s.pivot = fminf(value_at<T>(e, scales, position), scales.top);
}

// --- the first window, by one warp

// The window of entries in (lo, hi].
__device__ __forceinline__ void open_window(Search& search, float lo, float hi, uint64_t before, bool from_end) {
  search.first = uint64_t{rank_bits(hi)} << kIndexBits;
  search.last = (uint64_t{rank_bits(lo)} << kIndexBits) - 1;
  search.before = before;
  search.lo = lo;
  search.hi = hi;
  search.from_end = from_end;
  search.fresh = search.covered = true;
  search.found = false;
}

template <class T, bool kResident>
__device__ void open_by_count(const Context<T, kResident>& c, const Scales& scales, CutShared& s) {
  const float k = static_cast<float>(c.p.top_k);
  const float lo = value_at<T>(s.estimate, scales, position_of(s.estimate.entries, k + 12.0f * sqrtf(k) + 64.0f));
  if (c.team.lane != 0) return;
  s.pivot = INFINITY;
  s.search.total = 0;
  open_window(s.search, lo < scales.top ? lo : -INFINITY, scales.top, 0, false);
}

// All that a cut found before keeps.
__device__ __forceinline__ void open_up_to_cut(Search& search, float top) {
  const uint64_t last = search.cut;
  const bool listed = search.covered;
  open_window(search, value_of_bits(static_cast<uint32_t>(last >> kIndexBits)), top, 0, false);
  search.last = last;
  search.total = 0;
  search.fresh = !listed;
}

// From the pivot to a little past where the sample says that the rest of p * total lies.
template <class T, bool kResident>
__device__ void open_by_mass(const Context<T, kResident>& c, const Scales& scales, CutShared& s) {
  constexpr float kUnit = 1.0f / static_cast<float>(uint64_t{1} << kMassBits);
  const uint64_t total = c.team.total(c.shared.warps, &WarpRecord::drawn);
  const uint64_t above = c.team.total(c.shared.warps, &WarpRecord::kept);
  const bool keeps_all_above = in_nucleus(above, total, c.p.top_p);
  const double missing = c.p.top_p * static_cast<double>(total) - static_cast<double>(above);
  const float reach = kUnit * (1.3f * fabsf(static_cast<float>(missing)) + 0.003f * static_cast<float>(total));
  const float at_pivot = sum_at(s.estimate.weights, s.pivot_position);
  const float target = keeps_all_above ? at_pivot + reach : at_pivot - reach;
  const float far_end = value_at<T>(s.estimate, scales, position_of(s.estimate.weights, target));
  const bool few_above = sum_at(s.estimate.entries, s.pivot_position) <= 1.5f * listable(c.team);
  if (c.team.lane != 0) return;
  s.search.total = total;
  if (keeps_all_above) {
    open_window(s.search, far_end < s.pivot ? far_end : -INFINITY, s.pivot, above, false);
  } else if (few_above || target <= 0.0f || !(far_end > s.pivot) || far_end >= scales.top) {
    open_window(s.search, s.pivot, scales.top, 0, false);
  } else {
    open_window(s.search, s.pivot, far_end, above, true);
  }
}

// --- one pass

__device__ __forceinline__ void add_weight(unsigned (&bin)[2], uint64_t weight) {
  const unsigned low = static_cast<unsigned>(weight), old = atomicAdd(&bin[0], low);
  atomicAdd(&bin[1], static_cast<unsigned>(weight >> 32) + (old + low < old ? 1u : 0u));
}

__device__ __forceinline__ int window_shift(const Search& search) {
  const int bits = 64 - __clzll(static_cast<long long>(search.last - search.first));
  return bits > kBinBits ? bits - kBinBits : 0;
}

// Counts the entry at a place of the segment if it is in the window; all lanes call.
template <class T, bool kResident>
__device__ void count_entry(const Context<T, kResident>& c, const Scales& scales, const Search& search, bool by_count,
                            bool active, int place, Tally& tally) {
  uint64_t rank = 0, weight = 0;
  if (active) {
    const int i = c.segment_begin() + place;
    const float x = c.slice.value(i);
    rank = rank_of(x, c.slice.begin + i);
    const bool inside = rank >= search.first && rank <= search.last;
    if (inside) weight = by_count ? 1 : mass_of(scales.draw_weight(x));
  }
  if (weight > 0) add_weight(tally.bins[(rank - search.first) >> window_shift(search)], weight);
  const unsigned counted = __ballot_sync(kAllLanes, weight > 0);
  if (counted == 0) return;
  int slot = 0;
  if (c.team.lane == 0) slot = atomicAdd(&tally.n, __popc(counted));
  slot = __shfl_sync(kAllLanes, slot, 0) + __popc(counted & ((1u << c.team.lane) - 1));
  if (weight > 0 && slot < kWarp) tally.finalists[slot] = {rank, weight};
}

template <class T, bool kResident>
__device__ void count_window(const Context<T, kResident>& c, const Scales& scales, const Search& search, bool by_count,
                             const EntryList& list, Tally& tally) {
  if (list.is_complete()) {
    for (int first = 0; first < list.n; first += kWarp) {
      const int i = first + c.team.lane;
      count_entry(c, scales, search, by_count, i < list.n, i < list.n ? list.places[i] : 0, tally);
    }
    return;
  }
  for (int tile = 0; tile < c.p.layout.tiles; ++tile) {
    uint32_t found = tile_within(c, tile, search.lo, search.hi);
    while (__any_sync(kAllLanes, found != 0)) {
      const bool active = found != 0;
      count_entry(c, scales, search, by_count, active, active ? take_entry(found, tile, c.team.lane) : 0, tally);
    }
  }
}

// --- what a pass tells, by one warp

__device__ __forceinline__ uint64_t warp_largest(uint64_t v) {
  const unsigned high = __reduce_max_sync(kAllLanes, static_cast<unsigned>(v >> 32));
  const unsigned low =
      __reduce_max_sync(kAllLanes, static_cast<unsigned>(v >> 32) == high ? static_cast<unsigned>(v) : 0u);
  return uint64_t{high} << 32 | low;
}

// The last rank kept of the n <= 32 entries that all blocks counted.
template <class T, bool kResident>
__device__ uint64_t order_finalists(const Context<T, kResident>& c, const CutRule& rule, Tally& tally, int n,
                                    uint64_t before, uint64_t total) {
  Finalist mine{0, 0};
  for (int r = 0, begin = 0; r < c.team.size; ++r) {
    const Tally& other = *shared_of_rank(&tally, r);
    if (c.team.lane >= begin && c.team.lane < begin + other.n) mine = other.finalists[c.team.lane - begin];
    begin += other.n;
  }
  for (int lane = 0; lane < n; ++lane) {
    const uint64_t rank = __shfl_sync(kAllLanes, mine.rank, lane), weight = __shfl_sync(kAllLanes, mine.weight, lane);
    before += rank < mine.rank ? weight : 0;
  }
  return warp_largest(c.team.lane < n && rule.keeps(before, total) ? mine.rank : 0);
}

// The bin that holds the last entry kept, and the weight before it.
__device__ __forceinline__ int crossing_bin(const CutRule& rule, const uint64_t (&weights)[kBinsPerLane],
                                            uint64_t& before, uint64_t total) {
  const int lane = threadIdx.x % kWarp;
  uint64_t lane_total = 0;
  for (const uint64_t w : weights) lane_total += w;
  uint64_t here = before + warp_inclusive_sums(lane_total) - lane_total, before_bin = 0;
  int bin = -1;
#pragma unroll
  for (int i = 0; i < kBinsPerLane; ++i) {
    if (weights[i] > 0 && rule.keeps(here, total)) {
      bin = kBinsPerLane * lane + i;
      before_bin = here;
    }
    here += weights[i];
  }
  bin = __reduce_max_sync(kAllLanes, bin);
  before = __shfl_sync(kAllLanes, before_bin, bin / kBinsPerLane);
  return bin;
}

// The next window, or the cut.
template <class T, bool kResident>
__device__ void narrow(const Context<T, kResident>& c, const CutRule& rule, float top, Tally& tally, Search& shared) {
  Search search = shared;
  uint64_t weights[kBinsPerLane] = {}, lane_total = 0;
  int n = 0;
  for (int r = 0; r < c.team.size; ++r) {
    const Tally& other = *shared_of_rank(&tally, r);
    n += other.n;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) {
      const unsigned (&bin)[2] = other.bins[kBinsPerLane * c.team.lane + i];
      weights[i] += uint64_t{bin[1]} << 32 | bin[0];
    }
  }
  for (const uint64_t w : weights) lane_total += w;
  const uint64_t in_window = warp_total(lane_total);
  uint64_t before = search.before - (search.from_end ? in_window : 0);
  if (search.total == 0) search.total = before + in_window;

  search.fresh = false;
  if (!rule.keeps(before, search.total)) {  // the cut is ranked before the window
    open_window(search, search.hi, top, 0, false);
    search.covered = false;
  } else if (rule.keeps(before + in_window, search.total)) {  // after it
    if (search.last >= end_rank()) {
      search.cut = search.last;
      search.found = true;
    } else {
      open_window(search, -INFINITY, search.lo, before + in_window, false);
      search.covered = false;
    }
  } else if (n <= kWarp) {
    search.cut = order_finalists(c, rule, tally, n, before, search.total);
    search.found = true;
  } else {
    const int shift = window_shift(search);
    search.first += static_cast<uint64_t>(crossing_bin(rule, weights, before, search.total)) << shift;
    search.last = min(search.last, search.first + (uint64_t{1} << shift) - 1);
    search.before = before;
    search.from_end = false;
    search.cut = search.first;
    search.found = search.first == search.last;
  }
  __syncwarp();
  if (c.team.lane == 0) shared = search;
}

// --- all of it, by all threads

// Passes until the cut is found; tallies[pass % 2] is clear. The list is of the last fresh window.
template <class T, bool kResident>
__device__ void find_cut(const Context<T, kResident>& c, const CutRule& rule, const Scales& scales, CutShared& s,
                         EntryList& list, int& pass) {
  while (!s.search.found) {
    const Search search = s.search;
    Tally& tally = s.tallies[pass % 2];
    if (search.fresh) list.fill(c, search.lo, search.hi);
    count_window(c, scales, search, rule.by_count, list, tally);
    c.team.sync();
    ++pass;
    clear(s.tallies[pass % 2]);
    if (c.team.warp == 0) narrow(c, rule, scales.top, tally, s.search);
    __syncthreads();
  }
}

// From the masses above the pivot to those of the kept entries, in every tile of the warp; returns their sum.
template <class T, bool kResident>
__device__ uint64_t keep_up_to(const Context<T, kResident>& c, const Scales& scales, float pivot, bool covered,
                               uint64_t cut, const EntryList& list) {
  uint64_t all = 0;
  for (int tile = 0; tile < c.p.layout.tiles; ++tile) {
    uint64_t mass = 0;
    if (covered && list.is_complete()) {
      for (int i = (tile > 0 ? list.ends[tile - 1] : 0) + c.team.lane; i < list.ends[tile]; i += kWarp) {
        const int place = c.segment_begin() + list.places[i];
        const float x = c.slice.value(place);
        const bool kept = rank_of(x, c.slice.begin + place) <= cut;
        if (kept == (x > pivot)) continue;
        const uint64_t one = mass_of(scales.draw_weight(x));
        mass += kept ? one : 0 - one;
      }
      mass = warp_total(mass) + c.tile_sums[tile];
    } else {
      MassSum sum;
      for (int k = 0; k < kSteps; ++k) {
        const int chunk = c.chunk_of(tile, k);
        if (chunk >= c.own.end) break;
        float x[kChunk];
        unpack(c.slice.chunk(chunk), x);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (rank_of(x[i], c.slice.begin + kChunk * chunk + i) <= cut) sum.add(scales.draw_weight(x[i]));
        }
      }
      mass = warp_total(sum.mass());
    }
    __syncwarp();
    if (c.team.lane == 0) c.tile_sums[tile] = mass;
    all += mass;
  }
  return all;
}

}  // namespace diffullama::token_stats
