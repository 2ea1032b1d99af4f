// SPDX-License-Identifier: Apache-2.0
// Tensor maps of the operands of the sm_90a attention kernels; host code.
#pragma once

#include "../common/tensor_map.h"
#include "attention_kernel.h"

namespace diffullama {

// [B, heads, L, D], of which a load copies `box_rows` rows of a head.
inline cudaError_t encode_operand(CUtensorMap& map, const AttentionOperand& t, bool is_half, int B, int heads, int L,
                                  int D, int box_rows) {
  const auto bytes = [](int64_t stride) { return static_cast<uint64_t>(2 * stride); };
  return encode_tensor_map(
      map, t.data, is_half,
      {{static_cast<uint64_t>(D), static_cast<uint64_t>(L), static_cast<uint64_t>(heads), static_cast<uint64_t>(B)},
       {bytes(t.row), bytes(t.head), bytes(t.batch)},
       static_cast<uint32_t>(box_rows)});
}

}  // namespace diffullama
