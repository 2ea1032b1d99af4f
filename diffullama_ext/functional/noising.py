# SPDX-License-Identifier: Apache-2.0
"""The absorbing forward process."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from .._library import use_kernel
from ..checks import check_int, check_tensor
from .random import index_tensor, seed_tensor


class MaskedTokens(NamedTuple):
    """What :func:`mask_tokens` drew."""

    xt: Tensor  # [B, L] int64, x0 with the masked tokens replaced
    masked: Tensor  # [B, L] bool, the draw itself
    positions: Tensor  # [B * L] int64, flat row-major positions of the masked tokens, then -1
    counts: Tensor  # [B] int64, masked tokens of each sequence


def mask_tokens(
    x0: Tensor,
    p_mask: Tensor,
    *,
    mask_id: int,
    maskable: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_index: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> MaskedTokens:
    """Absorbing forward process: each maskable token becomes ``mask_id`` with probability ``p_mask``.

    The draw of a token is a function of (seed, sample_index, position) alone: it is the same in any batch, on any
    number of devices, under recomputation and on CPU and CUDA, bit for bit. p_mask = 0 masks nothing, 1 everything.

    Args:
        x0: [B, L] int64 clean tokens.
        p_mask: [B] or [B, L] float32 in [0, 1].
        mask_id: the id written; at least 0.
        maskable: [B, L] bool, False protects prompts and padding; None means all.
        seed: 64 bits, int or int64 [1] on the device; None draws one from ``generator``.
        sample_index: [B] int64 global number of each sequence; None means 0..B-1.
        generator: source of the seed where none is given.
        impl: "auto", "ext" or "reference".

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range (a p_mask outside [0, 1] raises on
            the CPU and is clamped on CUDA).
    """
    check_tensor("x0", x0, torch.int64, ("B", "L"))
    batch, length = x0.shape
    by_token = isinstance(p_mask, Tensor) and p_mask.dim() == 2
    check_tensor("p_mask", p_mask, torch.float32, (batch, length) if by_token else (batch,), x0.device)
    if maskable is not None:
        check_tensor("maskable", maskable, torch.bool, (batch, length), x0.device)
    check_int("mask_id", mask_id, 0, 2**63 - 1)
    use = use_kernel("mask_tokens", x0.device, impl)
    if not use and x0.device.type == "cpu" and not ((p_mask >= 0) & (p_mask <= 1)).all():
        raise ValueError(f"p_mask must be in [0, 1], got {p_mask[~((p_mask >= 0) & (p_mask <= 1))][0].item()}")
    backend = ops.noising if use else reference.noising
    index = index_tensor("sample_index", sample_index, batch, x0.device)
    return MaskedTokens(
        *backend.mask_tokens(x0, p_mask, maskable, seed_tensor(seed, generator, x0.device), index, mask_id)
    )
