// SPDX-License-Identifier: Apache-2.0
// Bit, integer, conversion and floating-point intrinsics; loads with cache hints are plain loads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace simulator {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Saturating like the device: NaN gives 0.
template <class To, class From>
To saturating(From v) {
  if (v != v) return 0;
  constexpr To kLow = std::numeric_limits<To>::min(), kHigh = std::numeric_limits<To>::max();
  if (v <= static_cast<From>(kLow)) return kLow;
  if (v >= static_cast<From>(kHigh)) return kHigh;
  return static_cast<To>(v);
}

}  // namespace simulator

// --- memory
#define SIMULATOR_LOAD(name) \
  template <class T>         \
  T name(const T* address) { \
    return *address;         \
  }
SIMULATOR_LOAD(__ldg)
SIMULATOR_LOAD(__ldca)
SIMULATOR_LOAD(__ldcg)
SIMULATOR_LOAD(__ldcs)
SIMULATOR_LOAD(__ldlu)
#undef SIMULATOR_LOAD
#define SIMULATOR_STORE(name)      \
  template <class T>               \
  void name(T* address, T value) { \
    *address = value;              \
  }
SIMULATOR_STORE(__stwb)
SIMULATOR_STORE(__stcg)
SIMULATOR_STORE(__stcs)
SIMULATOR_STORE(__stwt)
#undef SIMULATOR_STORE

// --- bits
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int k = 0; k < 32; ++k) reversed |= (v >> k & 1u) << (31 - k);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long v) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(v))) << 32 |
         __brev(static_cast<unsigned>(v >> 32));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) {
    const unsigned nibble = selector >> 4 * k & 0xfu;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (nibble & 7u)) & 0xffu;
    if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << 8 * k;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// --- the same bits as another type
inline unsigned __float_as_uint(float v) { return simulator::bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return simulator::bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return simulator::bits_as<float>(v); }
inline float __int_as_float(int v) { return simulator::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return simulator::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return simulator::bits_as<double>(v); }

// --- conversions; _rn rounds to nearest even (the host's rounding mode), _rz to zero, _rd down, _ru up
inline int __float2int_rn(float v) { return simulator::saturating<int>(std::nearbyint(static_cast<double>(v))); }
inline int __float2int_rz(float v) { return simulator::saturating<int>(static_cast<double>(v)); }
inline int __float2int_rd(float v) { return simulator::saturating<int>(std::floor(static_cast<double>(v))); }
inline int __float2int_ru(float v) { return simulator::saturating<int>(std::ceil(static_cast<double>(v))); }
inline unsigned __float2uint_rn(float v) {
  return simulator::saturating<unsigned>(std::nearbyint(static_cast<double>(v)));
}
inline unsigned __float2uint_rz(float v) { return simulator::saturating<unsigned>(static_cast<double>(v)); }
inline unsigned long long __float2ull_rn(float v) {
  return simulator::saturating<unsigned long long>(std::nearbyint(v));
}
inline unsigned long long __float2ull_rz(float v) { return simulator::saturating<unsigned long long>(v); }
inline unsigned long long __double2ull_rn(double v) {
  return simulator::saturating<unsigned long long>(std::nearbyint(v));
}
inline unsigned long long __double2ull_rz(double v) { return simulator::saturating<unsigned long long>(v); }
inline long long __double2ll_rn(double v) { return simulator::saturating<long long>(std::nearbyint(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline float __ull2float_rn(unsigned long long v) { return static_cast<float>(v); }
inline float __double2float_rn(double v) { return static_cast<float>(v); }
inline double __ull2double_rn(unsigned long long v) { return static_cast<double>(v); }

// --- arithmetic that is never contracted, and the approximations (exact here: their error is the device's own)
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dadd_rd(double a, double b) {  // the rounding error of a + b is exact (Knuth, TwoSum)
  const double sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
  return error < 0 ? std::nextafter(sum, -INFINITY) : sum;
}
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __frsqrt_rn(float v) { return 1.0f / std::sqrt(v); }
using std::isfinite;
using std::isinf;
using std::isnan;

// CUDA's min and max mix the integer types by the usual conversions.
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
