// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 as their bits. Rounding is to nearest even; kernels compute in float.
#pragma once

#include <cstdint>
#include <cstring>

namespace simulator {

inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline float float_of_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t bfloat16_of_float(float v) {
  if (v != v) return 0x7fff;
  const uint32_t bits = float_bits(v);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float float_of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponents differ by 112; the product with 2^112 is exact, denormals included.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t half_of_float(float v) {
  if (v != v) return 0x7fff;
  const uint32_t bits = float_bits(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 puts the last bit, worth 2^-24, at the end of the float
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

}  // namespace simulator
