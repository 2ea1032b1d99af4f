// SPDX-License-Identifier: Apache-2.0
// Attention forward on sm_90a: TMA and wgmma, one producer warpgroup and two or three consumers of 64 queries.
//   producer : one warp chooses the tiles of keys that the mask leaves, says which (a KeyTile beside each K tile), and
//              keeps the rings of K and V full
//   consumer : S = Q K^T of the next tile and O += P V of this one run while the softmax of the next waits only for S;
//              the consumers take turns at issuing products, so that one's softmax falls into another's products
//   mask     : one loop; a tile of which bits are needed takes one 8-byte load a thread (fragment_mask), issued before
//   S
//              is there, and a predicated move a score; padding, causal order and the last key end in the same bits
//   schedule : a block a multiprocessor goes through the tiles of queries in fixed steps; or takes the next one from a
//              counter where the mask makes them differ in work; or has one alone, the longest first (causal)
//   bound    : tensor cores at D = 128; at D = 64 the exponentials come first
// Method: Shah et al., "FlashAttention-3" (2024), sections 3.1 and 3.2; softmax as in attention_forward_kernel.cu.
// Run in the simulator only; not yet run on a GPU.
// ptxas spills at most 56 B of attention_hopper_forward_kernel, all of the producer, which has 32 or 40 registers.
#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "attention_hopper_mask.cuh"
#include "attention_hopper_pipeline.cuh"
#include "attention_hopper_plan.h"
#include "attention_hopper_softmax.cuh"

namespace diffullama {
namespace {

struct HopperForwardParams {
  CUtensorMap q, k, v;
  MaskFragments fragments;
  AttentionMaskParams mask;
  int B, H, Hkv, Lq, Lk;
  float scale;
  void* out;
  float* lse;
  int* taken;  // 0 at first: tiles of queries taken beyond the first of each block; null: fixed steps
};

template <int D>
struct Pipeline {
  static constexpr HopperAttentionTile kTile = hopper_attention_tile(D);

  Mbarrier q_full, q_empty, k_full[kTile.stages], k_empty[kTile.stages], v_full[kTile.stages], v_empty[kTile.stages];
  KeyTile item[kTile.stages];  // comes and goes with K

  __device__ void init() {
    constexpr int kConsumerWarps = 4 * kTile.groups;
    mbarrier_init(q_full, 1);
    mbarrier_init(q_empty, kConsumerWarps);
    for (int i = 0; i < kTile.stages; ++i) {
      mbarrier_init(k_full[i], 1);
      mbarrier_init(v_full[i], 1);
      mbarrier_init(k_empty[i], kConsumerWarps);
      mbarrier_init(v_empty[i], kConsumerWarps);
    }
    mbarrier_init_fence();
  }
};

// Panels of 64 columns, [D / 64][rows][64].
template <class T, int D>
struct SharedTiles {
  static constexpr HopperAttentionTile kTile = hopper_attention_tile(D);
  static constexpr int kPanels = D / kPanel;

  T q[kPanels][kTile.rows()][kPanel];
  T k[kTile.stages][kPanels][kHopperColumns][kPanel];
  T v[kTile.stages][kPanels][kHopperColumns][kPanel];
};

// A tile of queries of one head; the longest come first where causal order makes them differ.
struct QueryTile {
  int b, h, kv_head, q0;

  __device__ QueryTile(const HopperForwardParams& p, int index, int rows) {
    const int n_tiles = (p.Lq + rows - 1) / rows, head = index / n_tiles;
    b = head / p.H;
    h = head % p.H;
    kv_head = h / (p.H / p.Hkv);
    q0 = (n_tiles - 1 - index % n_tiles) * rows;
  }
};

__device__ __forceinline__ int query_tiles(const HopperForwardParams& p, int rows) {
  return p.B * p.H * ((p.Lq + rows - 1) / rows);
}

// --- producer

// The next number of a counter that every warp takes from.
__device__ __forceinline__ int take(int* counter) {
  int taken = 0;
  if (lane_of() == 0) taken = atomicAdd(counter, 1);
  return __shfl_sync(kAllLanes, taken, 0);
}

template <class T, int kPanels, int kRows>
__device__ __forceinline__ void load_panels(T (&to)[kPanels][kRows][kPanel], const CUtensorMap& map, Mbarrier& barrier,
                                            int row, int head, int b) {
  mbarrier_arrive_expect(barrier, static_cast<int>(sizeof to));
#pragma unroll
  for (int i = 0; i < kPanels; ++i) tma_load(to[i], map, barrier, i * kPanel, row, head, b);
}

// What the tiles of keys hold for the queries at q0, two bits a consumer.
template <int kGroups>
__device__ __forceinline__ uint32_t classes_of(const SequenceMask& mask, int q0, int key_tile) {
  uint32_t classes = 0;
#pragma unroll 1  // registers are few here
  for (int g = 0; g < kGroups; ++g) {
    if (q0 + 64 * g >= mask.Lq) break;  // kNothing
    const TileClass held = mask.template tile<64, kHopperColumns>(q0 + 64 * g, key_tile * kHopperColumns);
    classes |= static_cast<uint32_t>(held) << 2 * g;
  }
  return classes;
}

// One warp: its lanes look at a tile of keys each, then the first goes through those that are needed.
template <class T, int D>
__device__ __forceinline__ void produce(const HopperForwardParams& p, SharedTiles<T, D>& tiles, Pipeline<D>& pipeline) {
  constexpr HopperAttentionTile kTile = hopper_attention_tile(D);
  RingPlace<kTile.stages> k_at, v_at;
  const auto next_item = [&](KeyTile item) {
    mbarrier_wait(pipeline.k_empty[k_at.stage()], k_at.parity() ^ 1);
    pipeline.item[k_at.stage()] = item;
  };
  int q_parity = 0;
  for (int index = static_cast<int>(blockIdx.x); index < query_tiles(p, kTile.rows());) {
    const QueryTile at(p, index, kTile.rows());
    if (lane_of() == 0) {
      mbarrier_wait(pipeline.q_empty, q_parity ^ 1);
      load_panels(tiles.q, p.q, pipeline.q_full, at.q0, at.h, at.b);
    }
    q_parity ^= 1;
    for (int first = 0; first * kHopperColumns < p.Lk; first += kWarp) {
      const int mine = first + lane_of();
      const uint32_t classes =
          mine * kHopperColumns < p.Lk ? classes_of<kTile.groups>({p.mask, at.b, p.Lq, p.Lk}, at.q0, mine) : 0;
      for (uint32_t needed = __ballot_sync(kAllLanes, classes != 0); needed != 0; needed &= needed - 1) {
        const int lane = __ffs(static_cast<int>(needed)) - 1, tile = first + lane;
        const uint32_t held = __shfl_sync(kAllLanes, classes, lane);
        if (lane_of() == 0) {
          next_item({tile, held, index});
          load_panels(tiles.k[k_at.stage()], p.k, pipeline.k_full[k_at.stage()], tile * kHopperColumns, at.kv_head,
                      at.b);
          mbarrier_wait(pipeline.v_empty[v_at.stage()], v_at.parity() ^ 1);
          load_panels(tiles.v[v_at.stage()], p.v, pipeline.v_full[v_at.stage()], tile * kHopperColumns, at.kv_head,
                      at.b);
        }
        k_at.advance();
        v_at.advance();
      }
    }
    if (lane_of() == 0) {
      next_item({KeyTile::kEnd, 0, index});
      mbarrier_arrive(pipeline.k_full[k_at.stage()]);
    }
    k_at.advance();
    index = static_cast<int>(gridDim.x) + (p.taken ? take(p.taken) : index);
  }
  if (lane_of() == 0) {
    next_item({KeyTile::kStop, 0, 0});
    mbarrier_arrive(pipeline.k_full[k_at.stage()]);
  }
}

// --- consumers

template <class T, int D>
struct Products {
  static constexpr HopperAttentionTile kTile = hopper_attention_tile(D);
  static constexpr int kStageBytes = static_cast<int>(sizeof(SharedTiles<T, D>::k[0]));
  static constexpr int kPanelBytes = kHopperColumns * kPanel * 2;

  uint64_t q, k, v;

  __device__ Products(const SharedTiles<T, D>& tiles, int group)
      : q(matrix_descriptor(&tiles.q[0][64 * group])),
        k(matrix_descriptor(&tiles.k[0])),
        v(matrix_descriptor(&tiles.v[0], kPanelBytes)) {}

  // s = Q K^T
  __device__ __forceinline__ void scores(float (&s)[16][4], int stage) const {
    const uint64_t keys = matrix_after(k, stage * kStageBytes);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int panel = i / 4, in_row = i % 4 * 32;
      wgmma<T, false>(s, matrix_after(q, panel * kTile.rows() * kPanel * 2 + in_row),
                      matrix_after(keys, panel * kPanelBytes + in_row), i > 0);
    }
  }

  // out += P V
  __device__ __forceinline__ void values(float (&out)[D / 8][4], const uint32_t (&probabilities)[8][4],
                                         int stage) const {
    const uint64_t values = matrix_after(v, stage * kStageBytes);
#pragma unroll
    for (int i = 0; i < kHopperColumns / 16; ++i) {
      wgmma<T, true>(out, probabilities[i], matrix_after(values, i * 16 * kPanel * 2), true);
    }
  }
};

// Divides by the sums and writes 64 rows of the output and their logsumexps.
template <class T, int D>
__device__ __forceinline__ void store_rows(const HopperForwardParams& p, const QueryTile& at, int group,
                                           float (&out)[D / 8][4], const SoftmaxRows& rows, float scale) {
  const int q0 = at.q0 + 64 * group, n_rows = p.Lq - q0;
  const int64_t first = (int64_t{at.b} * p.H + at.h) * p.Lq + q0;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_quad(rows.sum[r]);
    factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = fragment_row(threadIdx.x % kWarpgroup) + 8 * r;
    if (lane_of() % 4 == 0 && row < n_rows) {
      p.lse[first + row] = kLn2 * (exponent_of(rows.max[r], scale) + log2f(sum));  // log2f(0) is -inf
    }
  }
  scale_rows(out, factor);
  store_accumulators(out, static_cast<T*>(p.out) + first * D, n_rows);
}

template <class T, int D>
__device__ __forceinline__ void consume(const HopperForwardParams& p, const SharedTiles<T, D>& tiles,
                                        Pipeline<D>& pipeline, int group) {
  constexpr HopperAttentionTile kTile = hopper_attention_tile(D);
  const Products<T, D> products(tiles, group);
  const Turns<kTile.groups> turns(group);
  const float scale = log2_scale(p.scale);
  RingPlace<kTile.stages> k_at, v_at;
  int q_parity = 0;
  // The next K tile's item, when that tile is there.
  const auto next_item = [&] {
    mbarrier_wait(pipeline.k_full[k_at.stage()], k_at.parity());
    return pipeline.item[k_at.stage()];
  };
  for (;;) {
    KeyTile item = next_item();
    if (item.tile == KeyTile::kStop) break;
    const QueryTile at(p, item.queries, kTile.rows());
    const FragmentBits mask(p.fragments, {p.mask, at.b, p.Lq, p.Lk}, at.q0 + 64 * group);
    SoftmaxRows rows;
    float s[16][4], out[D / 8][4] = {};
    uint32_t probabilities[8][4];

    mbarrier_wait(pipeline.q_full, q_parity);
    q_parity ^= 1;
    // Of the end that next_item has come to: this tile of queries is used up.
    const auto release_end = [&] {
      release(pipeline.k_empty[k_at.stage()]);
      k_at.advance();
      release(pipeline.q_empty);
    };
    if (item.tile == KeyTile::kEnd) {
      release_end();
    } else {  // a branch round all products: accumulators that meet after one make ptxas wait for every product
      wgmma_fence(s, out);
      products.scores(s, k_at.stage());
      wgmma_commit();
      wgmma_commit();  // of the product with V that later rounds have here
      for (bool first = true;; first = false) {
        const TileClass held = item.of(group);
        uint2 bits{0, 0};
        if (held == TileClass::kBits) bits = mask.tile(item.tile);
        wgmma_wait<1>(s);
        release(pipeline.k_empty[k_at.stage()]);
        k_at.advance();
        if (held != TileClass::kEverything) forbid_fragment(s, bits);
        float factor[2];
        softmax_scores(s, rows, factor, scale);
        settle(fminf(rows.sum[0], rows.sum[1]));
        wgmma_wait<0>(out, probabilities);
        if (!first) {
          release(pipeline.v_empty[v_at.stage()]);
          v_at.advance();
        }
        if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) scale_rows(out, factor);
        pack_left<T>(probabilities, s);
        item = next_item();
        mbarrier_wait(pipeline.v_full[v_at.stage()], v_at.parity());
        if (item.tile == KeyTile::kEnd) break;
        turns.wait();
        wgmma_fence(s, out, probabilities);
        products.scores(s, k_at.stage());
        wgmma_commit();
        products.values(out, probabilities, v_at.stage());
        wgmma_commit();
        turns.pass();
      }
      release_end();
      wgmma_fence(out, probabilities);
      products.values(out, probabilities, v_at.stage());
      wgmma_commit();
      wgmma_wait<0>(out, probabilities);
      release(pipeline.v_empty[v_at.stage()]);
      v_at.advance();
    }
    store_rows<T, D>(p, at, group, out, rows, scale);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(hopper_attention_tile(D).threads(), 1)
    attention_hopper_forward_kernel(const __grid_constant__ HopperForwardParams p) {
  constexpr HopperAttentionTile kTile = hopper_attention_tile(D);
  SharedTiles<T, D>& tiles = *swizzled_shared<SharedTiles<T, D>>();
  Pipeline<D>& pipeline = static_shared<Pipeline<D>>();
  if (threadIdx.x == 0) {
    tma_prefetch(p.q);
    tma_prefetch(p.k);
    tma_prefetch(p.v);
    pipeline.init();
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    lower_registers<kTile.producer_registers>();
    if (threadIdx.x < kWarp) produce(p, tiles, pipeline);
  } else {
    raise_registers<kTile.consumer_registers>();
    consume(p, tiles, pipeline, warpgroup - 1);
  }
}

// --- host

cudaError_t encode(CUtensorMap& map, const AttentionOperand& t, bool is_half, int B, int heads, int L, int D,
                   int box_rows) {
  const auto bytes = [](int64_t stride) { return static_cast<uint64_t>(2 * stride); };
  return encode_tensor_map(
      map, t.data, is_half,
      {{static_cast<uint64_t>(D), static_cast<uint64_t>(L), static_cast<uint64_t>(heads), static_cast<uint64_t>(B)},
       {bytes(t.row), bytes(t.head), bytes(t.batch)},
       static_cast<uint32_t>(box_rows)});
}

template <class T, int D>
cudaError_t launch_forward(const AttentionParams& p, const MaskFragments& fragments, int* taken, bool is_half,
                           cudaStream_t stream) {
  HopperForwardParams h{};
  h.fragments = fragments;
  h.mask = p.mask;
  h.B = p.B;
  h.H = p.H;
  h.Hkv = p.Hkv;
  h.Lq = p.Lq;
  h.Lk = p.Lk;
  h.scale = p.scale;
  h.out = p.out;
  h.lse = p.lse;
  h.taken = taken;
  cudaError_t error = encode(h.q, p.q, is_half, p.B, p.H, p.Lq, D, hopper_attention_tile(D).rows());
  if (error == cudaSuccess) error = encode(h.k, p.k, is_half, p.B, p.Hkv, p.Lk, D, kHopperColumns);
  if (error == cudaSuccess) error = encode(h.v, p.v, is_half, p.B, p.Hkv, p.Lk, D, kHopperColumns);
  int device = 0, n_sm = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const MaskKind kind = p.mask.causal ? MaskKind::kCausal : p.mask.words ? MaskKind::kBits : MaskKind::kFull;
  const KernelPlan plan = plan_attention_hopper({p.B, p.H, p.Hkv, p.Lq, p.Lk, D}, is_half, kind, 1, n_sm);
  return launch(attention_hopper_forward_kernel<T, D>, dim3(static_cast<unsigned>(plan.grid)), dim3(plan.block),
                plan.shared_bytes, stream, h);
}

}  // namespace

cudaError_t launch_attention_hopper(const AttentionParams& p, const MaskFragments& fragments, int* taken, int D,
                                    bool is_half, cudaStream_t stream) {
  const auto with_width = [&](auto type) {
    using T = typename decltype(type)::type;
    return D == 128  ? launch_forward<T, 128>(p, fragments, taken, is_half, stream)
           : D == 64 ? launch_forward<T, 64>(p, fragments, taken, is_half, stream)
                     : cudaErrorInvalidValue;
  };
  return is_half ? with_width(ElementType<__half>{}) : with_width(ElementType<__nv_bfloat16>{});
}

}  // namespace diffullama
