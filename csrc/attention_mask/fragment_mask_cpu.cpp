// SPDX-License-Identifier: Apache-2.0
// fragment_mask and mask_tile_classes on the CPU: tiles in parallel.
#include <algorithm>

#include "../common/kernel_plan.h"
#include "attention_mask.h"
#include "attention_mask_math.h"

namespace diffullama {
namespace {

// The words of one mask; bits past k_length read as 0 whatever they are.
struct Mask {
  const uint32_t* words;  // [q_length, n_words]
  int64_t q_length, k_length, n_words;

  uint32_t word(int64_t q, int64_t w) const {
    return q < q_length && w < n_words ? words[q * n_words + w] & bits_up_to(k_length - 1, w) : 0;
  }
};

using TileRows = uint32_t[kFragmentRows][kFragmentTileWords];

void transpose(uint32_t (&rows)[32]) {
  for (int distance = 16; distance > 0; distance /= 2) {
    uint32_t next[32];
    for (int r = 0; r < 32; ++r) next[r] = transpose_stage(rows[r], rows[r ^ distance], r, distance);
    std::copy(next, next + 32, rows);
  }
}

void read_tile(const Mask& mask, int64_t first_row, int64_t first_word, TileRows& tile) {
  for (int r = 0; r < kFragmentRows; ++r) {
    for (int w = 0; w < kFragmentTileWords; ++w) tile[r][w] = mask.word(first_row + r, first_word + w);
  }
}

// The same tile of the transpose: its rows are keys.
void read_transposed_tile(const Mask& mask, int64_t first_row, int64_t first_word, TileRows& tile) {
  for (int half = 0; half < kFragmentRows / 32; ++half) {
    for (int w = 0; w < kFragmentTileWords; ++w) {
      uint32_t block[32];
      for (int r = 0; r < 32; ++r) block[r] = mask.word(32 * (first_word + w) + r, first_row / 32 + half);
      transpose(block);
      for (int r = 0; r < 32; ++r) tile[32 * half + r][w] = block[r];
    }
  }
}

void write_fragments(const TileRows& tile, uint32_t* out) {
  for (int thread = 0; thread < kFragmentThreads; ++thread) {
    const uint32_t *row0 = tile[fragment_row(thread)], *row1 = tile[fragment_row(thread) + 8];
    for (int half = 0; half < 2; ++half) {
      const uint32_t low = fragment_bits(row0[2 * half], row1[2 * half], thread % 4);
      const uint32_t high = fragment_bits(row0[2 * half + 1], row1[2 * half + 1], thread % 4);
      out[2 * thread + half] = low | high << 16;
    }
  }
}

Tensor fragment_mask_cpu(const Tensor& words, int64_t k_length, bool transposed) {
  check_unpack_mask(words, k_length);
  const int64_t M = words.size(0), Lq = words.size(1), W = words.size(2);
  const int64_t row_tiles = ceil_div(transposed ? k_length : Lq, kFragmentRows);
  const int64_t column_tiles = ceil_div(transposed ? Lq : k_length, kFragmentColumns);
  const Tensor words_c = as_contiguous(words);
  Tensor fragments = empty_like_device(words, {M, row_tiles, column_tiles, kFragmentThreads, 2}, ScalarType::Int);
  const auto* in = reinterpret_cast<const uint32_t*>(words_c.const_data_ptr<int32_t>());
  auto* out = reinterpret_cast<uint32_t*>(fragments.mutable_data_ptr<int32_t>());
  torch::stable::parallel_for(0, M * row_tiles * column_tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / (row_tiles * column_tiles);
      const int64_t first_row = i / column_tiles % row_tiles * kFragmentRows;
      const int64_t first_word = i % column_tiles * kFragmentTileWords;
      const Mask mask{in + m * Lq * W, Lq, k_length, W};
      TileRows tile;
      (transposed ? read_transposed_tile : read_tile)(mask, first_row, first_word, tile);
      write_fragments(tile, out + i * kFragmentThreads * 2);
    }
  });
  return fragments;
}

TileClass class_of(const Mask& mask, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
  bool any_allowed = false, any_forbidden = false;
  for (int64_t q = row_begin; q < row_end && !(any_allowed && any_forbidden); ++q) {
    for (int64_t w = begin / 32; w < ceil_div(end, 32); ++w) {
      const uint32_t inside = bits_between(begin, end, w), allowed = mask.word(q, w) & inside;
      any_allowed |= allowed != 0;
      any_forbidden |= allowed != inside;
    }
  }
  return tile_class(any_allowed, any_forbidden);
}

Tensor mask_tile_classes_cpu(const Tensor& words, int64_t k_length, int64_t tile_rows, int64_t tile_cols) {
  check_mask_tile_classes(words, k_length, tile_rows, tile_cols);
  const int64_t M = words.size(0), Lq = words.size(1), W = words.size(2);
  const int64_t row_tiles = ceil_div(Lq, tile_rows), column_tiles = ceil_div(k_length, tile_cols);
  const Tensor words_c = as_contiguous(words);
  Tensor classes = empty_like_device(words, {M, row_tiles, column_tiles}, ScalarType::Byte);
  const auto* in = reinterpret_cast<const uint32_t*>(words_c.const_data_ptr<int32_t>());
  uint8_t* out = classes.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, M * row_tiles * column_tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / (row_tiles * column_tiles);
      const int64_t row = i / column_tiles % row_tiles * tile_rows, column = i % column_tiles * tile_cols;
      const Mask mask{in + m * Lq * W, Lq, k_length, W};
      out[i] = static_cast<uint8_t>(
          class_of(mask, row, std::min(row + tile_rows, Lq), column, std::min(column + tile_cols, k_length)));
    }
  });
  return classes;
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, CPU, m) {
  m.impl("fragment_mask", TORCH_BOX(&diffullama::fragment_mask_cpu));
  m.impl("mask_tile_classes", TORCH_BOX(&diffullama::mask_tile_classes_cpu));
}
