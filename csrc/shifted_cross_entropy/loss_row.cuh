// SPDX-License-Identifier: Apache-2.0
// One row of logits in a block of kLossThreads: values, reductions, gradient. Device only.
//
// Acc is float, or double for double logits. Each thread owns the 16-byte vectors t, t + kLossThreads, ... of the row
// (its elements t, t + kLossThreads, ... where rows are not aligned), so what it reads in the second pass is what it
// read in the first, and writing in place races with nobody.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/simt.cuh"
#include "loss_kernel.h"
#include "loss_plan.h"
#include "shifted_cross_entropy_math.h"

namespace diffullama {

constexpr float kLog2e = 1.4426950408889634f;

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using WideT = typename WideOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrowed(WideT<T> v);
template <>
__device__ __forceinline__ float narrowed<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double narrowed<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrowed<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrowed<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// float32 logits are owed expf's precision; for 16-bit ones the hardware's 2^-22 is far below their own rounding.
template <class T>
__device__ __forceinline__ WideT<T> exp_of(WideT<T> v) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx(v * kLog2e);
  } else {
    return exp(v);
  }
}

template <class T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

// Elements of a packed vector; kept packed in registers, where 16-bit elements of their own would take twice the space.
template <class T>
__device__ __forceinline__ void unpack(uint4 packed, WideT<T> (&values)[kPerVector<T>]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      T pair[2];
      memcpy(pair, &words[w], sizeof pair);
      values[2 * w] = widen(pair[0]);
      values[2 * w + 1] = widen(pair[1]);
    }
  } else {
    memcpy(values, words, sizeof values);
  }
}

template <class T>
__device__ __forceinline__ uint4 packed(const T (&elements)[kPerVector<T>]) {
  uint4 result;
  memcpy(&result, elements, sizeof result);
  return result;
}

// A row, of which each thread keeps kResident vectors in registers, or none (kResident = 0: global memory again).
template <class T, int kResident>
class Row {
 public:
  using Acc = WideT<T>;

  // aligned: rows start on a vector boundary and are a whole number of vectors apart, so that the last vector may be
  // read whole. Required where kResident > 0.
  __device__ Row(const T* z, int64_t V, bool aligned) : z_(z), V_(V), aligned_(aligned) {
    if constexpr (kResident > 0) {
#pragma unroll
      for (int k = 0; k < kResident; ++k) held_[k] = first_of(k) < V ? load(first_of(k)) : uint4{};
    }
  }

  // f(values, v, n): the thread's elements v .. v + n - 1, in groups.
  template <class F>
  __device__ __forceinline__ void each_group(F f) const {
    if constexpr (kResident > 0) {
#pragma unroll
      for (int k = 0; k < kResident; ++k) {
        if (first_of(k) < V_) call(f, held_[k], first_of(k));
      }
    } else if (aligned_) {
      for (int64_t first = int64_t{threadIdx.x} * kPerVector<T>; first < V_; first += kLossThreads * kPerVector<T>) {
        call(f, load(first), first);
      }
    } else {
      for (int64_t v = threadIdx.x; v < V_; v += kLossThreads) {
        const Acc value[kPerVector<T>] = {widen(z_[v])};
        f(value, v, 1);
      }
    }
  }

  // out[v] = f(value, v) for the thread's elements; out may be the row itself, and is aligned where the row is.
  template <class F>
  __device__ __forceinline__ void write(T* out, F f) const {
    each_group([&](const Acc(&values)[kPerVector<T>], int64_t first, int n) {
      if (n == kPerVector<T> && aligned_) {
        T elements[kPerVector<T>];
#pragma unroll
        for (int e = 0; e < kPerVector<T>; ++e) elements[e] = narrowed<T>(f(values[e], first + e));
        *reinterpret_cast<uint4*>(out + first) = packed<T>(elements);
      } else {
#pragma unroll
        for (int e = 0; e < kPerVector<T>; ++e) {
          if (e < n) out[first + e] = narrowed<T>(f(values[e], first + e));
        }
      }
    });
  }

 private:
  __device__ __forceinline__ static int64_t first_of(int k) {
    return (int64_t{k} * kLossThreads + threadIdx.x) * kPerVector<T>;
  }

  __device__ __forceinline__ uint4 load(int64_t first) const { return *reinterpret_cast<const uint4*>(z_ + first); }

  template <class F>
  __device__ __forceinline__ void call(F& f, uint4 group, int64_t first) const {
    Acc values[kPerVector<T>];
    unpack<T>(group, values);
    f(values, first, first + kPerVector<T> <= V_ ? kPerVector<T> : static_cast<int>(V_ - first));
  }

  const T* z_;
  int64_t V_;
  bool aligned_;
  uint4 held_[kResident > 0 ? kResident : 1];
};

// Maximum, sum of exponentials relative to it, and plain sum, of part of a row.
template <class Acc>
struct Partial {
  Acc max, sum, values;
};

template <class T>
__device__ __forceinline__ Partial<WideT<T>> merged(Partial<WideT<T>> a, Partial<WideT<T>> b) {
  using Acc = WideT<T>;
  const Acc max = a.max > b.max ? a.max : b.max;
  const auto scaled = [max](Partial<Acc> p) { return p.max == max ? p.sum : p.sum * exp_of<T>(p.max - max); };
  return {max, scaled(a) + scaled(b), a.values + b.values};
}

template <class Acc>
struct LossShared {
  Partial<Acc> warp[kLossThreads / kWarp];
  Acc target;
};

template <class T>
__device__ Partial<WideT<T>> block_merged(Partial<WideT<T>> p, LossShared<WideT<T>>& shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {  // the same tree in every lane: all get the same bits
    p = merged<T>(p, {__shfl_xor_sync(kAllLanes, p.max, offset), __shfl_xor_sync(kAllLanes, p.sum, offset),
                      __shfl_xor_sync(kAllLanes, p.values, offset)});
  }
  if (threadIdx.x % kWarp == 0) shared.warp[threadIdx.x / kWarp] = p;
  __syncthreads();
  p = shared.warp[0];
  for (int w = 1; w < kLossThreads / kWarp; ++w) p = merged<T>(p, shared.warp[w]);
  return p;
}

// A logit after bias and softcap.
template <class T>
struct LogitMap {
  using Acc = WideT<T>;
  const T* bias;  // [V] or null
  Acc softcap;    // 0 is none

  __device__ __forceinline__ Acc operator()(Acc raw, int64_t v) const {
    if (bias != nullptr) raw += widen(bias[v]);
    return softcap > Acc(0) ? softcap * tanh(raw / softcap) : raw;
  }
};

template <class Acc>
struct RowLoss {
  Acc lse, nll;
};

// lse and nll of the row, to every thread. An id outside [0, V) gives NaN.
template <class T, int kResident>
__device__ RowLoss<WideT<T>> row_loss(const Row<T, kResident>& row, const T* z, int64_t V, int64_t target,
                                      LogitMap<T> map, WideT<T> smoothing, LossShared<WideT<T>>& shared) {
  using Acc = WideT<T>;
  const bool valid = target >= 0 && target < V;
  // Before anyone overwrites the row: block_merged has the barrier.
  if (threadIdx.x == 0) shared.target = valid ? map(widen(z[target]), target) : Acc(NAN);
  Partial<Acc> p{-INFINITY, 0, 0};
  row.each_group([&](const Acc(&raw)[kPerVector<T>], int64_t first, int n) {
    Acc value[kPerVector<T>], group_max = -INFINITY;
#pragma unroll
    for (int e = 0; e < kPerVector<T>; ++e) {
      value[e] = e < n ? map(raw[e], first + e) : Acc(-INFINITY);
      group_max = value[e] > group_max ? value[e] : group_max;
      if (smoothing != Acc(0)) p.values += e < n ? value[e] : Acc(0);
    }
    if (group_max > p.max) {
      p.sum = p.max == -INFINITY ? p.sum : p.sum * exp_of<T>(p.max - group_max);
      p.max = group_max;
    }
#pragma unroll
    for (int e = 0; e < kPerVector<T>; ++e) {
      // -inf - -inf would be NaN where nothing finite was seen yet; a NaN logit must stay one.
      p.sum += value[e] == -INFINITY ? Acc(0) : exp_of<T>(value[e] - p.max);
    }
  });
  p = block_merged<T>(p, shared);
  const Acc lse = p.max + log(p.sum);
  return {lse, row_nll(lse, shared.target, p.values / static_cast<Acc>(V), smoothing)};
}

// scale * d nll / d raw logit
template <class T>
__device__ __forceinline__ WideT<T> logit_gradient(WideT<T> raw, int64_t v, int64_t target, WideT<T> lse,
                                                   WideT<T> scale, WideT<T> smoothing, WideT<T> uniform,
                                                   LogitMap<T> map) {
  using Acc = WideT<T>;
  const Acc z = map(raw, v);
  Acc g = exp_of<T>(z - lse) - uniform;
  if (v == target) g -= Acc(1) - smoothing;
  return scale * (map.softcap > Acc(0) ? g * softcap_slope(z, map.softcap) : g);
}

}  // namespace diffullama
