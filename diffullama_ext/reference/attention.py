# SPDX-License-Identifier: Apache-2.0
"""Softmax attention under an arbitrary mask, with the logsumexp; a row that may attend to nothing gives zeros."""

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, key_padding: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, H, Lq, D], k and v [B, Hkv, Lk, D], allowed bool [M, Lq, Lk], key_padding bool [B, Lk] (True = a real key).

    Returns (out [B, H, Lq, D] in q's dtype, lse [B, H, Lq] float32 or float64); computed in at least float32.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # the dtype is chosen already
        return _attention(q, k, v, allowed, key_padding, scale, dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))  # [B, H, Lk, D]
    scores = scale * (q.to(dtype) @ k.transpose(-2, -1))  # [B, H, Lq, Lk]
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    if key_padding is not None:
        scores = scores.masked_fill(~key_padding[:, None, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    empty = lse == -torch.inf
    p = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])  # all -inf: exp(-inf - 0) = 0
    return (p @ v).to(q.dtype), lse
