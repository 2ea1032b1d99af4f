# SPDX-License-Identifier: Apache-2.0
"""The absorbing forward process q(xt | x0): every maskable token becomes the mask with probability p_mask."""

import torch
from torch import Tensor

from .philox import MASK32, TAG_NOISE, philox, threshold32


def noise_words(length: int, seed: Tensor, sample_index: Tensor) -> Tensor:
    """Random words [B, L] keyed by (seed, sample_index, position): counter (position / 4, low half, tag, high half)."""
    group = torch.arange((length + 3) // 4, device=sample_index.device)[None, :]  # [1, ceil(L/4)]
    sample = sample_index[:, None]  # [B, 1]
    words = philox(group, sample & MASK32, TAG_NOISE, (sample >> 32) & MASK32, seed)  # [B, ceil(L/4), 4]
    return words.flatten(1)[:, :length]


def mask_tokens(
    x0: Tensor, p_mask: Tensor, maskable: Tensor | None, seed: Tensor, sample_index: Tensor, mask_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`diffullama_ext.mask_tokens`; returns (xt, masked, positions, counts)."""
    length = x0.shape[1]
    threshold = threshold32(p_mask if p_mask.dim() == 2 else p_mask[:, None])  # [B, L] or [B, 1]
    masked = noise_words(length, seed, sample_index) < threshold
    if maskable is not None:
        masked = masked & maskable
    xt = torch.where(masked, mask_id, x0)
    flat = masked.flatten()
    found = torch.arange(flat.numel(), device=x0.device)[flat]  # row-major order
    positions = torch.full((flat.numel(),), -1, dtype=torch.int64, device=x0.device)
    positions[: found.numel()] = found
    return xt, masked, positions, masked.sum(dim=1)
