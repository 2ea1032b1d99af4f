// SPDX-License-Identifier: Apache-2.0
// The mask ops on CUDA: check, guard, contiguous, allocate, launch.
#include "../common/cuda_host.h"
#include "../common/kernel_plan.h"
#include "attention_mask.h"
#include "attention_mask_kernel.h"
#include "attention_mask_math.h"

namespace diffullama {
namespace {

Tensor empty_words(const Tensor& like, int64_t n_masks, int64_t q_length, int64_t k_length) {
  return empty_like_device(like, {n_masks, q_length, words_per_row(k_length)}, ScalarType::Int);
}

const uint32_t* words_in(const Tensor& words) {
  return reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
}
uint32_t* words_out(const Tensor& words) { return reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()); }

Tensor pack_mask_cuda(const Tensor& allowed) {
  check_pack_mask(allowed);
  const DeviceGuard guard(allowed.get_device_index());
  const Tensor allowed_c = as_contiguous(allowed);
  Tensor words = empty_words(allowed, allowed.size(0), allowed.size(1), allowed.size(2));
  if (words.numel() == 0) return words;
  const PackMaskParams p{const_bytes(allowed_c), words_out(words), allowed.size(0), allowed.size(1), allowed.size(2)};
  check_launch("pack_mask_kernel", launch_pack_mask(p, current_stream(allowed)));
  return words;
}

Tensor unpack_mask_cuda(const Tensor& words, int64_t k_length) {
  check_unpack_mask(words, k_length);
  const DeviceGuard guard(words.get_device_index());
  const Tensor words_c = as_contiguous(words);
  Tensor allowed = empty_like_device(words, {words.size(0), words.size(1), k_length}, ScalarType::Bool);
  if (allowed.numel() == 0) return allowed;
  const UnpackMaskParams p{words_in(words_c), mutable_bytes(allowed), words.size(0), words.size(1), k_length};
  check_launch("unpack_mask_kernel", launch_unpack_mask(p, current_stream(words)));
  return allowed;
}

Tensor id_mask_cuda(const Tensor& query_ids, const Tensor& key_ids, bool exact) {
  check_id_mask(query_ids, key_ids);
  const DeviceGuard guard(query_ids.get_device_index());
  const Tensor query_c = as_contiguous(query_ids), key_c = as_contiguous(key_ids);
  const int64_t M = query_ids.size(0), Lq = query_ids.size(1), Lk = key_ids.size(1);
  Tensor words = empty_words(query_ids, M, Lq, Lk);
  if (words.numel() == 0) return words;
  const IdMaskParams p{
      query_c.const_data_ptr<int64_t>(), key_c.const_data_ptr<int64_t>(), words_out(words), M, Lq, Lk, exact};
  check_launch("id_mask_kernel", launch_id_mask(p, current_stream(query_ids)));
  return words;
}

Tensor annealed_mask_cuda(int64_t length, const Tensor& attn_mask_ratio, const Tensor& seed, const Tensor& step) {
  check_annealed_mask(length, attn_mask_ratio, seed, step);
  const DeviceGuard guard(attn_mask_ratio.get_device_index());
  Tensor words = empty_words(attn_mask_ratio, 1, length, length);
  if (length == 0) return words;
  const AnnealedMaskParams p{attn_mask_ratio.const_data_ptr<float>(), seed.const_data_ptr<int64_t>(),
                             step.const_data_ptr<int64_t>(), words_out(words), length};
  check_launch("annealed_mask_kernel", launch_annealed_mask(p, current_stream(attn_mask_ratio)));
  return words;
}

Tensor fragment_mask_cuda(const Tensor& words, int64_t k_length, bool transposed) {
  check_unpack_mask(words, k_length);
  const DeviceGuard guard(words.get_device_index());
  const Tensor words_c = as_contiguous(words);
  const int64_t M = words.size(0), Lq = words.size(1), rows = transposed ? k_length : Lq;
  const int64_t columns = transposed ? Lq : k_length;
  Tensor fragments = empty_like_device(
      words, {M, ceil_div(rows, kFragmentRows), ceil_div(columns, kFragmentColumns), kFragmentThreads, 2},
      ScalarType::Int);
  if (fragments.numel() == 0) return fragments;
  const FragmentMaskParams p{words_in(words_c), words_out(fragments), M, Lq, k_length, transposed};
  check_launch("fragment_mask_kernel", launch_fragment_mask(p, current_stream(words)));
  return fragments;
}

Tensor mask_tile_classes_cuda(const Tensor& words, int64_t k_length, int64_t tile_rows, int64_t tile_cols) {
  check_mask_tile_classes(words, k_length, tile_rows, tile_cols);
  const DeviceGuard guard(words.get_device_index());
  const Tensor words_c = as_contiguous(words);
  const int64_t M = words.size(0), Lq = words.size(1);
  Tensor classes =
      empty_like_device(words, {M, ceil_div(Lq, tile_rows), ceil_div(k_length, tile_cols)}, ScalarType::Byte);
  if (classes.numel() == 0) return classes;
  const TileClassesParams p{words_in(words_c), classes.mutable_data_ptr<uint8_t>(), M, Lq, k_length, tile_rows,
                            tile_cols};
  check_launch("mask_tile_classes_kernel", launch_mask_tile_classes(p, current_stream(words)));
  return classes;
}

}  // namespace
}  // namespace diffullama

STABLE_TORCH_LIBRARY_IMPL(diffullama, DIFFULLAMA_CUDA_KEY, m) {
  m.impl("pack_mask", TORCH_BOX(&diffullama::pack_mask_cuda));
  m.impl("unpack_mask", TORCH_BOX(&diffullama::unpack_mask_cuda));
  m.impl("id_mask", TORCH_BOX(&diffullama::id_mask_cuda));
  m.impl("annealed_mask", TORCH_BOX(&diffullama::annealed_mask_cuda));
  m.impl("fragment_mask", TORCH_BOX(&diffullama::fragment_mask_cuda));
  m.impl("mask_tile_classes", TORCH_BOX(&diffullama::mask_tile_classes_cuda));
}
