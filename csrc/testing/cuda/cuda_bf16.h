// SPDX-License-Identifier: Apache-2.0
// __nv_bfloat16 and its conversions.
#pragma once

#include "half_formats.h"
#include "vector_types.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float v) : bits(simulator::bfloat16_of_float(v)) {}
  operator float() const { return simulator::float_of_bfloat16(bits); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 v;
  v.bits = bits;
  return v;
}

// NaN where either is; else the larger.
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto larger = [](float x, float y) { return x != x || x > y ? x : y; };
  return {__nv_bfloat16(larger(a.x, b.x)), __nv_bfloat16(larger(a.y, b.y))};
}
inline unsigned __hge2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
  return (float(a.x) >= float(b.x) ? 0xffffu : 0u) | (float(a.y) >= float(b.y) ? 0xffff0000u : 0u);
}
inline unsigned __hle2_mask(__nv_bfloat162 a, __nv_bfloat162 b) { return __hge2_mask(b, a); }
