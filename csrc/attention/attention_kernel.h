// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention_plan.h"

namespace diffullama {

// 16-bit elements [B, heads, L, D]: unit stride in D, the others in elements and multiples of 8, 16-byte aligned.
struct AttentionOperand {
  const void* data;
  int64_t batch, head, row;  // strides
};

// Who may attend to whom: the intersection of what is given.
struct AttentionMaskParams {
  const uint32_t* words;      // [M, Lq, ceil(Lk / 32)] or null
  const uint8_t* classes;     // TileClass [M, ceil(Lq / 64), ceil(Lk / 64)] of words, or null
  const uint32_t* key_words;  // [B, ceil(Lk / 32)] or null: padding
  int64_t words_batch;        // strides of M; 0 where the batch shares one mask
  int64_t classes_batch;
  bool causal;  // key <= query
};

// Sizes above 0; H is a multiple of Hkv.
struct AttentionParams {
  AttentionOperand q, k, v;
  AttentionMaskParams mask;
  int B, H, Hkv, Lq, Lk;
  float scale;  // at least 0
  void* out;    // [B, H, Lq, D] contiguous, as every output
  float* lse;   // [B, H, Lq]
};

// Of a query: x its logsumexp in base 2, +inf where it attends to nothing (so that 2^(score - x) is 0); y = sum dO * O.
using QueryStatistics = float2;

struct AttentionBackwardParams {
  AttentionOperand q, k, v, dout;
  AttentionMaskParams mask;
  int B, H, Hkv, Lq, Lk;
  float scale;
  const void* out;              // [B, H, Lq, D] contiguous
  const float* lse;             // [B, H, Lq]
  QueryStatistics* statistics;  // [B, H, statistics_rows] scratch
  int statistics_rows;          // Lq or more; {+inf, 0} where there is no query
  float* query_sums;            // query_sums_size() zeros (attention_query_sums.cuh)
  int* turns;                   // query_turns_size() zeros: sums in the order of the key tiles; null: in any order
  void* dq;                     // [B, H, Lq, D]
  void* dk;                     // [B, Hkv, Lk, D]
  void* dv;
};

// D is one of is_attention_width; is_half says float16, otherwise bfloat16.
cudaError_t launch_attention(const AttentionParams& p, int D, bool is_half, cudaStream_t stream);
// In this order on one stream.
cudaError_t launch_query_statistics(const AttentionBackwardParams& p, int D, bool is_half, cudaStream_t stream);
cudaError_t launch_key_gradient(const AttentionBackwardParams& p, int D, bool is_half, cudaStream_t stream);
cudaError_t launch_query_gradient(const AttentionBackwardParams& p, int D, bool is_half, cudaStream_t stream);

}  // namespace diffullama
