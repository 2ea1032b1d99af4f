# SPDX-License-Identifier: Apache-2.0
"""torch.ops.diffullama.{pack_mask, unpack_mask, id_mask, annealed_mask, fragment_mask, mask_tile_classes}.

Masks are int32 words [M, Lq, ceil(Lk/32)].
"""

import torch
from torch import Tensor


def _words(like: Tensor, n_masks: int, q_length: int, k_length: int) -> Tensor:
    return like.new_empty((n_masks, q_length, (k_length + 31) // 32), dtype=torch.int32)


@torch.library.register_fake("diffullama::pack_mask")
def _(allowed: Tensor) -> Tensor:
    return _words(allowed, *allowed.shape)


@torch.library.register_fake("diffullama::unpack_mask")
def _(words: Tensor, k_length: int) -> Tensor:
    return words.new_empty((words.shape[0], words.shape[1], k_length), dtype=torch.bool)


@torch.library.register_fake("diffullama::id_mask")
def _(query_ids: Tensor, key_ids: Tensor, exact: bool) -> Tensor:
    return _words(query_ids, query_ids.shape[0], query_ids.shape[1], key_ids.shape[1])


@torch.library.register_fake("diffullama::annealed_mask")
def _(length: int, attn_mask_ratio: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    return _words(attn_mask_ratio, 1, length, length)


@torch.library.register_fake("diffullama::fragment_mask")
def _(words: Tensor, k_length: int, transpose: bool) -> Tensor:
    rows, columns = (k_length, words.shape[1]) if transpose else (words.shape[1], k_length)
    return words.new_empty((words.shape[0], (rows + 63) // 64, (columns + 127) // 128, 128, 2))


@torch.library.register_fake("diffullama::mask_tile_classes")
def _(words: Tensor, k_length: int, tile_rows: int, tile_cols: int) -> Tensor:
    row_tiles, column_tiles = -(-words.shape[1] // tile_rows), -(-k_length // tile_cols)
    return words.new_empty((words.shape[0], row_tiles, column_tiles), dtype=torch.uint8)


def pack_mask(allowed: Tensor) -> Tensor:
    """bool [M, Lq, Lk] -> words."""
    return torch.ops.diffullama.pack_mask.default(allowed)


def unpack_mask(words: Tensor, k_length: int) -> Tensor:
    """words -> bool [M, Lq, k_length]."""
    return torch.ops.diffullama.unpack_mask.default(words, k_length)


def id_mask(query_ids: Tensor, key_ids: Tensor, exact: bool) -> Tensor:
    """Words of ``key_ids == query_ids`` (exact) or ``key_ids <= query_ids``."""
    return torch.ops.diffullama.id_mask.default(query_ids, key_ids, exact)


def annealed_mask(length: int, attn_mask_ratio: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """Words [1, L, ceil(L/32)] of causal OR Bernoulli(attn_mask_ratio)."""
    return torch.ops.diffullama.annealed_mask.default(length, attn_mask_ratio, seed, step)


def fragment_mask(words: Tensor, k_length: int, transpose: bool) -> Tensor:
    """The mask, or its transpose, in the order of accumulators: int32 [M, ceil(rows/64), ceil(columns/128), 128, 2]."""
    return torch.ops.diffullama.fragment_mask.default(words, k_length, transpose)


def mask_tile_classes(words: Tensor, k_length: int, tile_rows: int, tile_cols: int) -> Tensor:
    """uint8 [M, ceil(Lq/tile_rows), ceil(Lk/tile_cols)]: 0 nothing allowed, 1 everything, 2 bits."""
    return torch.ops.diffullama.mask_tile_classes.default(words, k_length, tile_rows, tile_cols)
