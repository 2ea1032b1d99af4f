// SPDX-License-Identifier: Apache-2.0
// exp of a non-positive number as arithmetic that compilers vectorise (no table, no branch, no library call).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace diffullama {

static inline float float_of_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Range reduction by n ln 2 in two parts, then a degree-6 polynomial (Cephes expf), then two exact scalings so that
// results down to the denormals are right. Relative error below 2e-7; exp(-inf) is 0.
static inline __attribute__((always_inline)) float exp_nonpositive(float x) {
  x = x < -104.0f ? -104.0f : x;  // e^-104 rounds to 0
  const float n = std::rint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(n), half = exponent >> 1;
  return p * float_of_bits((half + 127) << 23) * float_of_bits((exponent - half + 127) << 23);
}

static inline double exp_nonpositive(double x) { return std::exp(x); }

}  // namespace diffullama
