# SPDX-License-Identifier: Apache-2.0
"""Attention under an AttentionMask."""

import math
import sys

import torch
from torch import Tensor

from .. import ops, reference
from .._library import use_kernel
from ..attention_mask import AttentionMask
from ..checks import FLOATS, check_range, check_tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | None = None,
    *,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention under a mask, with GQA; a query that may attend to nothing gives zeros and zero gradients.

    Args:
        q: [B, H, Lq, D]; k, v: [B, Hkv, Lk, D] of one float dtype, H a multiple of Hkv; any strides.
        mask: for (Lq, Lk), of 1 or B masks; None means full.
        scale: of the scores; None means 1/sqrt(D).
        key_padding: [B, Lk] bool, True for real keys.
        return_lse: also return the logsumexp of the scores [B, H, Lq] (-inf where nothing is allowed; no gradient).
        deterministic: on CUDA, whether the gradient of q is summed in one order, so that repeated runs agree bitwise;
            slower. None means ``torch.are_deterministic_algorithms_enabled()``.
        impl: "auto", "ext" or "reference".

    By default the gradient of q varies in the last bits between runs on CUDA; the output, its logsumexp and the
    gradients of k and v never do, nor does anything on the CPU.

    On CUDA the kernel takes float16 and bfloat16 with D in 32, 64, 96, 128, 256, in memory O(B H L D); anything else
    runs through the reference, with a dense mask. ``DIFFULLAMA_ATTENTION`` (portable, hopper, reference) forces a path.

    Returns:
        out [B, H, Lq, D] in q's dtype, or (out, lse). Under autocast q, k and v are cast to its dtype.
    """
    check_tensor("q", q, FLOATS, ("B", "H", "Lq", "D"))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    batch, heads, q_length, width = q.shape
    check_tensor("k", k, q.dtype, (batch, "Hkv", "Lk", width), q.device)
    kv_heads, k_length = k.shape[1:3]
    check_tensor("v", v, q.dtype, (batch, kv_heads, k_length, width), q.device)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {heads}")
    if mask is not None and not isinstance(mask, AttentionMask):
        raise TypeError(f"mask must be an AttentionMask (from_dense makes one), got {type(mask).__name__}")
    if mask is not None and mask.device.type != q.device.type:
        raise ValueError(f"mask must be on {q.device}, got {mask!r}")
    if mask is not None and (mask.q_length, mask.k_length) != (q_length, k_length):
        raise ValueError(f"mask must be for ({q_length}, {k_length}), got {mask!r}")
    if mask is not None and mask.kind == "bits" and mask.n_masks not in (1, batch):
        raise ValueError(f"mask must hold 1 or {batch} masks, got {mask!r}")
    if key_padding is not None:
        check_tensor("key_padding", key_padding, torch.bool, (batch, k_length), q.device)
    if scale is None:
        scale = 1.0 / math.sqrt(width)
    check_range("scale", scale, -sys.float_info.max, sys.float_info.max)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    kind = "full" if mask is None else mask.kind
    path = ops.attention.path(q) if use_kernel("attention", q.device, impl) else "reference"
    if path == "reference":
        allowed = None if mask is None or kind == "full" else mask.to_dense()
        out, lse = reference.attention.attention(q, k, v, allowed, key_padding, scale)
    else:
        words = classes = fragments = transposed = None
        if mask is not None and kind == "bits":
            words = mask.words
            if path != "torch":
                classes = mask.tile_classes(ops.attention.CLASS_TILE, ops.attention.CLASS_TILE)
            if path == "hopper":
                fragments = mask.fragments()
                if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
                    transposed = mask.fragments(transpose=True)
        options = (words, classes, key_padding, kind == "causal", scale, fragments, transposed)
        out, lse = ops.attention.attention(q, k, v, *options, hopper=path == "hopper", deterministic=deterministic)
    return (out, lse.detach()) if return_lse else out


def annealed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask_ratio: float | Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """:func:`attention` under ``AttentionMask.annealed`` of q's length; the layers of a step share (seed, step)."""
    check_tensor("q", q, FLOATS, ("B", "H", "L", "D"))
    mask = AttentionMask.annealed(q.shape[2], attn_mask_ratio, seed=seed, step=step, device=q.device)
    out = attention(q, k, v, mask, scale=scale, key_padding=key_padding, deterministic=deterministic, impl=impl)
    assert isinstance(out, Tensor)
    return out
