// SPDX-License-Identifier: Apache-2.0
// CUDA's vector types with their alignments: UndefinedBehaviorSanitizer sees a vector access that is not aligned.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SIMULATOR_VECTOR2(name, T)     \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) { return {x, y}; }

#define SIMULATOR_VECTOR4(name, T)                               \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name { \
    T x, y, z, w;                                                \
  };                                                             \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMULATOR_VECTOR2(char2, signed char)
SIMULATOR_VECTOR4(char4, signed char)
SIMULATOR_VECTOR2(uchar2, unsigned char)
SIMULATOR_VECTOR4(uchar4, unsigned char)
SIMULATOR_VECTOR2(short2, short)
SIMULATOR_VECTOR4(short4, short)
SIMULATOR_VECTOR2(ushort2, unsigned short)
SIMULATOR_VECTOR4(ushort4, unsigned short)
SIMULATOR_VECTOR2(int2, int)
SIMULATOR_VECTOR4(int4, int)
SIMULATOR_VECTOR2(uint2, unsigned)
SIMULATOR_VECTOR4(uint4, unsigned)
SIMULATOR_VECTOR2(float2, float)
SIMULATOR_VECTOR4(float4, float)
SIMULATOR_VECTOR2(double2, double)
SIMULATOR_VECTOR2(longlong2, long long)
SIMULATOR_VECTOR2(ulonglong2, unsigned long long)

#undef SIMULATOR_VECTOR2
#undef SIMULATOR_VECTOR4
