// SPDX-License-Identifier: Apache-2.0
// One 32-bit word of a mask row: bit j % 32 of word j / 32 allows key j; host and device.
#pragma once

#include "../common/bernoulli.h"
#include "../common/philox.h"

namespace diffullama {

DIFFULLAMA_HOST_DEVICE int64_t words_per_row(int64_t k_length) { return (k_length + 31) / 32; }

// Bits of the keys of word w that are at most `last`: causal for query `last`, or the tail of a row for last = Lk - 1.
DIFFULLAMA_HOST_DEVICE uint32_t bits_up_to(int64_t last, int64_t w) {
  const int64_t n = last - 32 * w + 1;
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u;
}

// Counter of four consecutive Bernoulli planes of the word w of row i: index = 2^34 i + 32 w + plane.
DIFFULLAMA_HOST_DEVICE uint64_t plane_index4(int64_t i, int64_t w, int plane) {
  return (static_cast<uint64_t>(i) << 32) | (static_cast<uint64_t>(w) * 8 + static_cast<uint64_t>(plane / 4));
}

DIFFULLAMA_HOST_DEVICE bool allows(int64_t query_id, int64_t key_id, bool exact) {
  return exact ? key_id == query_id : key_id <= query_id;
}

}  // namespace diffullama
