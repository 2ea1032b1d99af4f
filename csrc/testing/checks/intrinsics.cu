// SPDX-License-Identifier: Apache-2.0
// Intrinsics on one thread: bits, conversions, and the two 16-bit formats.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../common/launch.h"
#include "../../common/simt.cuh"

namespace diffullama {
namespace {

// a and b give one column of 13 results each.
__global__ void bits_kernel(const uint64_t* a, const uint64_t* b, uint64_t* out, int n) {
  for (int i = 0; i < n; ++i) {
    const auto x = static_cast<uint32_t>(a[i]), y = static_cast<uint32_t>(b[i]);
    const uint64_t results[] = {static_cast<uint64_t>(__clz(static_cast<int>(x))),
                                static_cast<uint64_t>(__clzll(static_cast<long long>(a[i]))),
                                static_cast<uint64_t>(__popc(x)),
                                static_cast<uint64_t>(__popcll(a[i])),
                                static_cast<uint64_t>(__ffs(static_cast<int>(x))),
                                static_cast<uint64_t>(__ffsll(static_cast<long long>(a[i]))),
                                __brev(x),
                                __brevll(a[i]),
                                __umulhi(x, y),
                                __umul64hi(a[i], b[i]),
                                __byte_perm(x, y, y & 0x7777u),
                                __funnelshift_l(x, y, x),
                                __funnelshift_r(x, y, x)};
    for (int k = 0; k < 13; ++k) out[13 * i + k] = results[k];
  }
}

__global__ void convert_kernel(const float* in, int64_t* out, uint16_t* half_bits, uint16_t* bfloat16_bits, int n) {
  for (int i = 0; i < n; ++i) {
    out[6 * i] = __float2int_rn(in[i]);
    out[6 * i + 1] = __float2int_rz(in[i]);
    out[6 * i + 2] = __float2uint_rn(in[i]);
    out[6 * i + 3] = static_cast<int64_t>(__double2ull_rn(static_cast<double>(in[i])));
    out[6 * i + 4] = static_cast<int64_t>(__float_as_uint(in[i]));
    out[6 * i + 5] = static_cast<int64_t>(__float_as_uint(exp2_approx(in[i])));
    half_bits[i] = __half_as_ushort(__float2half(in[i]));
    bfloat16_bits[i] = __bfloat16_as_ushort(__float2bfloat16(in[i]));
  }
}

// All 65536 bit patterns.
__global__ void widen_kernel(float* from_half, float* from_bfloat16) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  from_half[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(i)));
  from_bfloat16[i] = __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(i)));
}

}  // namespace

extern "C" {

cudaError_t check_bits(const uint64_t* a, const uint64_t* b, uint64_t* out, int n) {
  return launch(bits_kernel, 1, 1, 0, nullptr, a, b, out, n);
}

cudaError_t check_conversions(const float* in, int64_t* out, uint16_t* half_bits, uint16_t* bfloat16_bits, int n) {
  return launch(convert_kernel, 1, 1, 0, nullptr, in, out, half_bits, bfloat16_bits, n);
}

cudaError_t check_widening(float* from_half, float* from_bfloat16) {
  return launch(widen_kernel, 256, 256, 0, nullptr, from_half, from_bfloat16);
}

}  // extern "C"
}  // namespace diffullama
