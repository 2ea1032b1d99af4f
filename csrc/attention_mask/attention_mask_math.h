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
  return (static_cast<uint64_t>(i) << 32) | (static_cast<uint32_t>(w) * 8 + static_cast<uint32_t>(plane / 4));
}

// The same draws from the highest plane down, as far as needed: an open bit is settled by the first plane in which its
// random bit equals the threshold's, as that bit; those that stay open to the end are 0. `set` is all ones where the
// threshold has the plane's bit.
DIFFULLAMA_HOST_DEVICE void settle_plane(uint32_t& drawn, uint32_t& open, uint32_t plane, uint32_t set) {
  drawn = (drawn & ~open) | (open & set);
  open &= plane ^ set;
}

DIFFULLAMA_HOST_DEVICE bool allows(int64_t query_id, int64_t key_id, bool exact) {
  return exact ? key_id == query_id : key_id <= query_id;
}

// --- copies in the order of a 64 x 128 tile's accumulators in 128 threads: thread 32 w + l holds, as bit
// i = c + 2 r + 4 v of 64, row 16 w + l / 4 + 8 r and column 8 v + 2 (l % 4) + c

constexpr int kFragmentRows = 64, kFragmentColumns = 128, kFragmentThreads = 128;
constexpr int kFragmentTileWords = kFragmentColumns / 32;

// Row of a thread for r = 0.
DIFFULLAMA_HOST_DEVICE int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// 16 of the bits: those in 32 columns of the rows r = 0 and r = 1. `pair` is l % 4.
DIFFULLAMA_HOST_DEVICE uint32_t fragment_bits(uint32_t row0, uint32_t row1, int pair) {
  const int shift = 2 * pair;
  const uint32_t nibbles = ((row0 >> shift) & 0x03030303u) | (((row1 >> shift) & 0x03030303u) << 2);  // one a byte
  const uint32_t bytes = (nibbles | nibbles >> 4) & 0x00ff00ffu;
  return (bytes | bytes >> 8) & 0xffffu;
}

// One stage of a 32 x 32 bit transpose, for distances 16, 8, 4, 2, 1: row r takes from row r ^ distance the quarter
// that changes places. keep are the columns that stay.
DIFFULLAMA_HOST_DEVICE uint32_t transpose_keep(int row, int distance) {
  const uint32_t low = distance == 16  ? 0x0000ffffu
                       : distance == 8 ? 0x00ff00ffu
                       : distance == 4 ? 0x0f0f0f0fu
                       : distance == 2 ? 0x33333333u
                                       : 0x55555555u;
  return row & distance ? ~low : low;
}
DIFFULLAMA_HOST_DEVICE uint32_t transpose_stage(uint32_t mine, uint32_t other, int row, int distance) {
  const uint32_t keep = transpose_keep(row, distance);
  const uint32_t moved = row & distance ? other >> distance : other << distance;
  return (mine & keep) | (moved & ~keep);
}

// --- what a tile holds

enum class TileClass : uint8_t { kNothing = 0, kEverything = 1, kBits = 2 };

DIFFULLAMA_HOST_DEVICE TileClass tile_class(bool any_allowed, bool any_forbidden) {
  return !any_allowed ? TileClass::kNothing : any_forbidden ? TileClass::kBits : TileClass::kEverything;
}

// Bits of word w inside the columns [begin, end).
DIFFULLAMA_HOST_DEVICE uint32_t bits_between(int64_t begin, int64_t end, int64_t w) {
  return bits_up_to(end - 1, w) & ~bits_up_to(begin - 1, w);
}

}  // namespace diffullama
