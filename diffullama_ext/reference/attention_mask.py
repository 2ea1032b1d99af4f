# SPDX-License-Identifier: Apache-2.0
"""Attention masks as bits: word w of row i holds the keys 32w .. 32w+31, key j at bit j % 32 (1 = may attend)."""

import torch
from torch import Tensor

from .philox import MASK32, TAG_ATTENTION_MASK, philox, threshold32


def _to_int32(words: Tensor) -> Tensor:
    """Reinterpret values in [0, 2**32) held in int64 as int32."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack_mask(allowed: Tensor) -> Tensor:
    """bool [M, Lq, Lk] -> int32 [M, Lq, ceil(Lk/32)]; bits past Lk are 0."""
    n_masks, q_length, k_length = allowed.shape
    n_words = (k_length + 31) // 32
    padded = torch.nn.functional.pad(allowed, (0, 32 * n_words - k_length)).reshape(n_masks, q_length, n_words, 32)
    weights = torch.ones(32, dtype=torch.int64, device=allowed.device) << torch.arange(32, device=allowed.device)
    return _to_int32((padded * weights).sum(dim=-1))


def unpack_mask(words: Tensor, k_length: int) -> Tensor:
    """int32 [M, Lq, W] -> bool [M, Lq, k_length]."""
    bits = (words[..., None].to(torch.int64) >> torch.arange(32, device=words.device)) & 1
    return bits.flatten(-2)[..., :k_length].bool()


def id_mask(query_ids: Tensor, key_ids: Tensor, exact: bool) -> Tensor:
    """Words of ``key_ids[k] == query_ids[q]`` (exact) or ``key_ids[k] <= query_ids[q]``; ids int64 [M, Lq], [M, Lk]."""
    q, k = query_ids[:, :, None], key_ids[:, None, :]
    return pack_mask(k == q if exact else k <= q)


def bernoulli_words(length: int, attn_mask_ratio: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """Words [L, ceil(L/32)] in [0, 2**32) whose bits are 1 with probability attn_mask_ratio, exact to 2**-32.

    Bit plane k of the word (i, w) is one random word, counter (8w + k/4, i, tag, step), lane k % 4. From the lowest
    plane up, ``r = p_k ? r | plane : r & plane`` makes every bit of r a Bernoulli(0.p_31 p_30 ... p_0) draw.
    """
    threshold = threshold32(attn_mask_ratio.reshape(()))
    n_words = (length + 31) // 32
    device = attn_mask_ratio.device
    i = torch.arange(length, device=device)[:, None]  # [L, 1]
    w = torch.arange(n_words, device=device)[None, :]  # [1, W]
    r = torch.zeros(length, n_words, dtype=torch.int64, device=device)
    for group in range(8):
        planes = philox(8 * w + group, i, TAG_ATTENTION_MASK, step.reshape(()) & MASK32, seed)  # [L, W, 4]
        for lane in range(4):
            p_k = (threshold >> (4 * group + lane)) & 1
            r = torch.where(p_k == 1, r | planes[..., lane], r & planes[..., lane])
    return torch.where(threshold >= 2**32, MASK32, r)


def annealed_mask(length: int, attn_mask_ratio: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """Words [1, L, ceil(L/32)] of causal OR Bernoulli(attn_mask_ratio): the paper's annealed attention mask."""
    position = torch.arange(length, device=attn_mask_ratio.device)
    causal = position[None, :] <= position[:, None]
    drawn = unpack_mask(_to_int32(bernoulli_words(length, attn_mask_ratio, seed, step))[None], length)
    return pack_mask(causal | drawn)


def fragment_mask(words: Tensor, k_length: int, transpose: bool) -> Tensor:
    """int32 [M, ceil(rows/64), ceil(columns/128), 128, 2]: bits in the order of a 64 x 128 tile's accumulators.

    Rows are queries and columns keys, or the reverse with ``transpose``. Thread 32w + l of a tile holds 64 bits; bit
    i = c + 2r + 4v (word i / 32, bit i % 32) is row 16w + l/4 + 8r, column 8v + 2(l % 4) + c. Padding is 0.
    """
    allowed = unpack_mask(words, k_length)
    allowed = allowed.mT if transpose else allowed
    n_masks, rows, columns = allowed.shape
    row_tiles, column_tiles = (rows + 63) // 64, (columns + 127) // 128
    allowed = torch.nn.functional.pad(allowed, (0, 128 * column_tiles - columns, 0, 64 * row_tiles - rows))
    # [M, row tile, w, r, l / 4, column tile, v, l % 4, c] -> [M, row tile, column tile, w, l / 4, l % 4, v, r, c]
    split = allowed.reshape(n_masks, row_tiles, 4, 2, 8, column_tiles, 16, 4, 2).permute(0, 1, 5, 2, 4, 7, 6, 3, 8)
    return pack_mask(split.reshape(n_masks, row_tiles * column_tiles * 128, 64)).reshape(
        n_masks, row_tiles, column_tiles, 128, 2
    )


def mask_tile_classes(words: Tensor, k_length: int, tile_rows: int, tile_cols: int) -> Tensor:
    """uint8 [M, ceil(Lq/tile_rows), ceil(Lk/tile_cols)]: 0 nothing in the tile is allowed, 1 everything is, 2 else."""
    allowed = unpack_mask(words, k_length)
    n_masks, q_length, _ = allowed.shape
    row_tiles, column_tiles = -(-q_length // tile_rows), -(-k_length // tile_cols)
    padding = (0, column_tiles * tile_cols - k_length, 0, row_tiles * tile_rows - q_length)

    def any_in_tile(entries: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(entries, padding)  # with False
        return padded.reshape(n_masks, row_tiles, tile_rows, column_tiles, tile_cols).any(dim=4).any(dim=2)

    any_allowed, any_forbidden = any_in_tile(allowed), any_in_tile(~allowed)
    return any_allowed.to(torch.uint8) * (1 + any_forbidden.to(torch.uint8))
