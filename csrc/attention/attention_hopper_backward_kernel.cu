// SPDX-License-Identifier: Apache-2.0
// Attention backward on sm_90a: TMA and wgmma, one producer warp and two consumer warpgroups of 64 keys each.
//   block    : keeps tiles of K and V of 128 keys and goes through the queries of all heads that share them
//   producer : takes tiles of keys from a counter, chooses the tiles of queries that the mask leaves, says which (a
//              QueryItem beside each Q tile), and keeps the ring of Q, dO and their statistics full
//   consumer : S^T = K Q^T and dP^T = V dO^T; P^T and dS^T go from accumulators to left operands in registers:
//              dV += P^T dO, dK += dS^T Q. dS goes through shared memory besides, since dQ = dS K takes all keys of the
//              block: the consumers share that product and add it to float32 sums in global memory
//   order    : S of the next tile is begun before dQ of this one is added; dP runs beside P, dV beside dS
//   mask     : one loop; a tile of which bits are needed takes a word a thread and 64 queries (fragment_mask of the
//              transpose) and a predicated move a score
//   bound    : tensor cores, and nearly as much shared memory, which feeds them
// Five products, each once. The order of the sums of dQ is that of the blocks' progress, or where asked that of keys.
// Run in the simulator only; not yet run on a GPU.
// ptxas spills 48 B of attention_hopper_backward_kernel, of the deterministic one only: in its producer, which counts
// turns with 24 registers, and two words of the consumers before their loop.
#include "../common/launch.h"
#include "attention_hopper_backward.cuh"
#include "attention_hopper_map.h"

namespace diffullama {
namespace {

// --- producer, one warp

template <class T, int D, bool kDeterministic>
struct Producer {
  using Tiles = BackwardTiles<T, D>;
  static constexpr int kQueries = Tiles::kQueries, kStages = Tiles::kTile.stages;

  const HopperBackwardParams& p;
  Tiles& tiles;
  BackwardPipeline<D>& pipeline;
  RingPlace<kStages> at;

  // Two bits a consumer of a tile of keys: what the tile of queries holds for it.
  __device__ __forceinline__ uint32_t classes(const SequenceMask& mask, int key_tile, int tile) const {
    uint32_t found = 0;
#pragma unroll
    for (int g = 0; g < kHopperBackwardGroups; ++g) {
      const int k0 = key_tile * kHopperKeys + 64 * g;
      if (k0 >= p.Lk) continue;  // kNothing
      found |= static_cast<uint32_t>(mask.template tile<kQueries, 64>(tile * kQueries, k0)) << 2 * g;
    }
    return found;
  }

  __device__ __forceinline__ void load(const QueryItem& item, int b) {
    const int q0 = item.tile * kQueries, stage = at.stage(), head = item.head - b * p.H;
    constexpr int kBytes = kQueries * static_cast<int>(sizeof(QueryStatistics));
    const int64_t queries = int64_t{(p.Lq + kQueries - 1) / kQueries} * kQueries;
    pipeline.item[stage] = item;
    load_panels(tiles.q[stage], p.q, pipeline.q_full[stage], q0, head, b);
    load_panels(tiles.dout[stage], p.dout, pipeline.dout_full[stage], q0, head, b, kBytes);
    bulk_load(tiles.statistics[stage], p.statistics + item.head * queries + q0, kBytes, pipeline.dout_full[stage]);
  }

  // All tiles of queries for one tile of keys, then the end.
  __device__ __forceinline__ void go_through_queries(const KeyTicket& keys) {
    const SequenceMask mask{p.mask, keys.b, p.Lq, p.Lk};
    const int n_tiles = (p.Lq + kQueries - 1) / kQueries, group = p.H / p.Hkv;
    for (int i = 0; i < group * n_tiles; ++i) {
      QueryItem item{i % n_tiles, keys.b * p.H + keys.kv_head * group + i / n_tiles, 0, 0};
      item.classes = classes(mask, keys.tile, item.tile);
      if (item.classes == 0) continue;
      if constexpr (kDeterministic) {
        item.turn = QueryTurns::turn(keys.tile, [&](int tile) { return classes(mask, tile, item.tile) != 0; });
      }
      mbarrier_wait(pipeline.empty[at.stage()], at.parity() ^ 1);
      if (lane_of() == 0) load(item, keys.b);
      at.advance();
    }
    mbarrier_wait(pipeline.empty[at.stage()], at.parity() ^ 1);
    if (lane_of() == 0) {
      pipeline.item[at.stage()] = {QueryItem::kEnd, 0, 0, 0};
      mbarrier_arrive(pipeline.q_full[at.stage()]);
      mbarrier_arrive(pipeline.dout_full[at.stage()]);  // its parity goes with q_full's
    }
    at.advance();
  }

  __device__ __forceinline__ void run() {
    const int n = p.B * p.Hkv * KeyTicket::key_tiles(p);
    for (int parity = 0;; parity ^= 1) {
      const int ticket = __shfl_sync(kAllLanes, lane_of() == 0 ? p.turns.ticket() : 0, 0);
      mbarrier_wait(pipeline.keys_empty, parity ^ 1);
      if (ticket >= n) break;
      const KeyTicket keys(p, ticket);
      if (lane_of() == 0) {
        pipeline.ticket = ticket;
        load_panels(tiles.k, p.k, pipeline.k_full, keys.tile * kHopperKeys, keys.kv_head, keys.b);
        load_panels(tiles.v, p.v, pipeline.v_full, keys.tile * kHopperKeys, keys.kv_head, keys.b);
      }
      go_through_queries(keys);
    }
    if (lane_of() == 0) {
      pipeline.ticket = BackwardPipeline<D>::kNone;
      mbarrier_arrive(pipeline.k_full);
    }
  }
};

// --- consumers

// Scores of 64 queries become P, given the queries' statistics.
template <int kN>
__device__ __forceinline__ void probabilities_of(float (&s)[kN][4], int half, const QueryStatistics* queries,
                                                 float scale) {
#pragma unroll
  for (int n = 8 * half; n < 8 * half + 8; ++n) {
    const float4 two = *reinterpret_cast<const float4*>(queries + 8 * n + 2 * (lane_of() % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = exp2_approx(fmaf(s[n][i], scale, i % 2 ? -two.z : -two.x));
  }
}

// dP of 64 queries becomes dS.
template <int kN>
__device__ __forceinline__ void score_gradients(float (&dp)[kN][4], const float (&p)[kN][4], int half,
                                                const QueryStatistics* queries) {
#pragma unroll
  for (int n = 8 * half; n < 8 * half + 8; ++n) {
    const float4 two = *reinterpret_cast<const float4*>(queries + 8 * n + 2 * (lane_of() % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) dp[n][i] = p[n][i] * (dp[n][i] - (i % 2 ? two.w : two.y));
  }
}

// The columns of 64 queries as the left operands of a product over them.
template <class T, int kN>
__device__ __forceinline__ void pack_half(uint32_t (&a)[4][4], const float (&d)[kN][4], int half) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = d[8 * half + 2 * k + i / 2];
      a[k][i] = pack2<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
  }
}

// What pack_half made to rows of a panel, swizzled as wgmma reads it; no two lanes meet a bank.
template <class T>
__device__ __forceinline__ void store_half(T (&panel)[kHopperKeys][kPanel], const uint32_t (&a)[4][4], int group) {
  const int row = 64 * group + fragment_row(threadIdx.x % kWarpgroup);
  const int place = row * kPanel + row % 8 * 8 + lane_of() % 4 * 2;  // of chunk 0
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T* const to = &panel[0][0] + (place ^ (2 * k + i / 2) * 8) + i % 2 * 8 * kPanel;
      *reinterpret_cast<uint32_t*>(to) = a[k][i];
    }
  }
}

// Adds a consumer's part of dQ to the sums, a warp 16 queries.
template <int D, bool kDeterministic>
__device__ __forceinline__ void add_to_sums(const HopperBackwardParams& p, const QueryItem& item, int group,
                                            const float (&dq)[8][4]) {
  constexpr int kQueries = hopper_backward_tile(D).queries;
  const int q0 = item.tile * kQueries + (D == 64 ? 64 * group : 0), first_column = D == 64 ? 0 : 8 * group;
  if (q0 >= p.Lq) return;
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp;
  [[maybe_unused]] const auto turn_of = [&] {
    const int64_t n_tiles = (p.Lq + kQueries - 1) / kQueries;
    return (item.head * n_tiles + item.tile) * 8 + 4 * group + warp;
  };
  if constexpr (kDeterministic) {
    if (lane_of() == 0) p.turns.wait(turn_of(), item.turn);
    __syncwarp();
  }
  float* const first = sums_fragment(sums_tile<D>(p.sums, item.head, p.Lq, q0), warp, first_column);
#pragma unroll
  for (int n = 0; n < 8; ++n) add_fragment(sums_fragment(first, 0, n), dq[n]);
  if constexpr (kDeterministic) {
    __threadfence();
    __syncwarp();
    if (lane_of() == 0) p.turns.pass(turn_of(), item.turn);
  }
}

template <class T, int D>
__device__ __forceinline__ void store_gradients(const HopperBackwardParams& p, int ticket, int group,
                                                float (&dk)[D / 8][4], const float (&dv)[D / 8][4]) {
  const KeyTicket keys(p, ticket);
  const int k0 = keys.tile * kHopperKeys + 64 * group;
  const int64_t first = ((int64_t{keys.b} * p.Hkv + keys.kv_head) * p.Lk + k0) * D;
  const float factor[2] = {p.scale, p.scale};
  scale_rows(dk, factor);
  store_accumulators(dk, static_cast<T*>(p.dk) + first, p.Lk - k0);
  store_accumulators(dv, static_cast<T*>(p.dv) + first, p.Lk - k0);
}

__device__ __forceinline__ KeyFragmentBits key_bits(const HopperBackwardParams& p, int ticket, int group) {
  const KeyTicket keys(p, ticket);
  return {p.fragments, {p.mask, keys.b, p.Lq, p.Lk}, keys.tile * kHopperKeys + 64 * group};
}

template <class T, int D, bool kDeterministic>
__device__ __forceinline__ void consume(const HopperBackwardParams& p, BackwardTiles<T, D>& tiles,
                                        BackwardPipeline<D>& pipeline, int group) {
  using Tiles = BackwardTiles<T, D>;
  constexpr int kQueries = Tiles::kQueries, kHalves = Tiles::kHalves;
  const BackwardProducts<T, D> products(tiles, group);
  const float scale = log2_scale(p.scale);
  RingPlace<Tiles::kTile.stages> at;
  int buffer = 0;  // of dS, and the parity of its barrier: they change together
  for (int parity = 0;; parity ^= 1) {
    mbarrier_wait(pipeline.k_full, parity);
    const int ticket = pipeline.ticket;
    if (ticket == BackwardPipeline<D>::kNone) break;
    const KeyFragmentBits mask = key_bits(p, ticket, group);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[kQueries / 8][4], dp[kQueries / 8][4], dq[8][4];
    uint32_t left_p[kHalves][4][4], left_ds[kHalves][4][4];
    // When the next Q tile is there, or the end.
    const auto next_is_end = [&] {
      mbarrier_wait(pipeline.q_full[at.stage()], at.parity());
      return pipeline.item[at.stage()].tile == QueryItem::kEnd;
    };
    bool ends = next_is_end();
    mbarrier_wait(pipeline.v_full, parity);
    if (!ends) {  // a branch round all products
      wgmma_fence(s, dk, dv);
      products.scores(s, at.stage());
      wgmma_commit();
      for (;;) {
        const TileClass held = pipeline.item[at.stage()].of(group);
        uint32_t bits[kHalves] = {};
        if (held == TileClass::kBits) mask.tile(bits, pipeline.item[at.stage()].tile * kQueries);
        mbarrier_wait(pipeline.dout_full[at.stage()], at.parity());
        wgmma_fence(dp);
        products.probability_gradients(dp, at.stage());
        wgmma_commit();
        const QueryStatistics* const queries = tiles.statistics[at.stage()];
        wgmma_wait<1>(s);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          if (held != TileClass::kEverything) forbid_half(s, half, bits[half]);
          probabilities_of(s, half, queries, scale);
          pack_half<T>(left_p[half], s, half);
          wgmma_fence(dv, left_p[half]);
          products.value_gradients(dv, left_p[half], at.stage(), half);
          wgmma_commit();
          if (half == 0) wgmma_wait<1>(dp);
          score_gradients(dp, s, half, queries);
          pack_half<T>(left_ds[half], dp, half);
          store_half(tiles.ds[buffer][half], left_ds[half], group);
        }
        fence_async_proxy();
        release(pipeline.ds_full);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          wgmma_fence(dk, left_ds[half]);
          products.key_gradients(dk, left_ds[half], at.stage(), half);
        }
        wgmma_commit();
        mbarrier_wait(pipeline.ds_full, buffer);
        wgmma_fence(dq);
        products.query_gradients(dq, buffer);
        wgmma_commit();
        buffer ^= 1;
        const int last = at.stage();
        at.advance();
        ends = next_is_end();
        wgmma_wait<0>(dk, dv, dq);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {  // these were the products' too
          hold_registers(left_p[half]);
          hold_registers(left_ds[half]);
        }
        const QueryItem item = pipeline.item[last];
        release(pipeline.empty[last]);
        if (ends) {
          add_to_sums<D, kDeterministic>(p, item, group, dq);
          break;
        }
        wgmma_fence(s);
        products.scores(s, at.stage());
        wgmma_commit();
        add_to_sums<D, kDeterministic>(p, item, group, dq);
      }
    }
    release(pipeline.empty[at.stage()]);  // of the end
    at.advance();
    release(pipeline.keys_empty);
    store_gradients<T, D>(p, ticket, group, dk, dv);
  }
}

template <class T, int D, bool kDeterministic>
__global__ void __launch_bounds__(kHopperBackwardThreads, 1)
    attention_hopper_backward_kernel(const __grid_constant__ HopperBackwardParams p) {
  constexpr HopperBackwardTile kTile = hopper_backward_tile(D);
  BackwardTiles<T, D>& tiles = *swizzled_shared<BackwardTiles<T, D>>();
  BackwardPipeline<D>& pipeline = static_shared<BackwardPipeline<D>>();
  if (threadIdx.x == 0) {
    tma_prefetch(p.q);
    tma_prefetch(p.k);
    tma_prefetch(p.v);
    tma_prefetch(p.dout);
    pipeline.init();
  }
  __syncthreads();
  const int warpgroup = uniform_warpgroup();
  if (warpgroup == 0) {
    lower_registers<kTile.producer_registers>();
    if (warp_of() == 0) Producer<T, D, kDeterministic>{p, tiles, pipeline, {}}.run();
  } else {
    raise_registers<kTile.consumer_registers>();
    consume<T, D, kDeterministic>(p, tiles, pipeline, warpgroup - 1);
  }
}

// --- host

template <class T, int D>
cudaError_t launch_backward(const AttentionBackwardParams& p, const HopperBackwardBuffers& buffers, bool is_half,
                            cudaStream_t stream) {
  constexpr int kQueries = hopper_backward_tile(D).queries;
  HopperBackwardParams h{};
  h.fragments = buffers.fragments;
  h.mask = p.mask;
  h.B = p.B;
  h.H = p.H;
  h.Hkv = p.Hkv;
  h.Lq = p.Lq;
  h.Lk = p.Lk;
  h.scale = p.scale;
  h.statistics = p.statistics;
  h.sums = p.query_sums;
  h.turns = {buffers.counters};
  h.dk = p.dk;
  h.dv = p.dv;
  cudaError_t error = encode_operand(h.q, p.q, is_half, p.B, p.H, p.Lq, D, kQueries);
  if (error == cudaSuccess) error = encode_operand(h.dout, p.dout, is_half, p.B, p.H, p.Lq, D, kQueries);
  if (error == cudaSuccess) error = encode_operand(h.k, p.k, is_half, p.B, p.Hkv, p.Lk, D, kHopperKeys);
  if (error == cudaSuccess) error = encode_operand(h.v, p.v, is_half, p.B, p.Hkv, p.Lk, D, kHopperKeys);
  int device = 0, n_sm = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const KernelPlan plan =
      plan_attention_hopper_backward({p.B, p.H, p.Hkv, p.Lq, p.Lk, D}, is_half, MaskKind::kFull, 1, n_sm);
  const auto kernel = buffers.deterministic ? attention_hopper_backward_kernel<T, D, true>
                                            : attention_hopper_backward_kernel<T, D, false>;
  return launch(kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(plan.block), plan.shared_bytes, stream, h);
}

}  // namespace

cudaError_t launch_attention_hopper_backward(const AttentionBackwardParams& p, const HopperBackwardBuffers& buffers,
                                             int D, bool is_half, cudaStream_t stream) {
  const auto with_width = [&](auto type) {
    using T = typename decltype(type)::type;
    return D == 128  ? launch_backward<T, 128>(p, buffers, is_half, stream)
           : D == 64 ? launch_backward<T, 64>(p, buffers, is_half, stream)
                     : cudaErrorInvalidValue;
  };
  return is_half ? with_width(ElementType<__half>{}) : with_width(ElementType<__nv_bfloat16>{});
}

}  // namespace diffullama
