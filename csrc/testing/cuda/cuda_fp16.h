// SPDX-License-Identifier: Apache-2.0
// __half and its conversions.
#pragma once

#include "half_formats.h"
#include "vector_types.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float v) : bits(simulator::half_of_float(v)) {}
  operator float() const { return simulator::float_of_half(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline float __half2float(__half v) { return v; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half v;
  v.bits = bits;
  return v;
}

// NaN where either is; else the larger.
inline __half2 __hmax2_nan(__half2 a, __half2 b) {
  const auto larger = [](float x, float y) { return x != x || x > y ? x : y; };
  return {__half(larger(a.x, b.x)), __half(larger(a.y, b.y))};
}
inline unsigned __hge2_mask(__half2 a, __half2 b) {
  return (float(a.x) >= float(b.x) ? 0xffffu : 0u) | (float(a.y) >= float(b.y) ? 0xffff0000u : 0u);
}
inline unsigned __hle2_mask(__half2 a, __half2 b) { return __hge2_mask(b, a); }
