# SPDX-License-Identifier: Apache-2.0
"""Inputs and calls of attention, forward and backward apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_mask import AttentionMask
from ..functional import attention

SEED = 7


class AttentionInputs(NamedTuple):
    """Of attention; mask None where the case has none."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hkv, L, D]
    v: Tensor  # [B, Hkv, L, D]
    upstream: Tensor  # [B, H, L, D]
    mask: AttentionMask | None
    out: Tensor | None  # with its graph, where the backward is measured


def attention_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> AttentionInputs:
    """A mask shared by batch and heads, with its tile classes made, as in the second layer of a step."""
    if s["mask"] not in ("annealed", "none"):
        raise ValueError(f"mask must be annealed or none, got {s['mask']!r}")
    mask = None
    if s["mask"] == "annealed":
        mask = AttentionMask.annealed(s["L"], s["ratio"], seed=SEED, device=device)
    heads = (s["H"], s["Hkv"], s["Hkv"], s["H"])
    q, k, v, upstream = (torch.randn(s["B"], h, s["L"], s["D"], dtype=dtype, device=device) for h in heads)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return AttentionInputs(q, k, v, upstream, mask, None)


def backward_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> AttentionInputs:
    """The same after the forward."""
    i = attention_inputs(s, dtype, device)
    out = attention(i.q, i.k, i.v, i.mask)
    assert isinstance(out, Tensor)
    return i._replace(out=out)


def run_attention(i: AttentionInputs) -> Tensor:
    """out [B, H, L, D]."""
    with torch.no_grad():
        out = attention(i.q, i.k, i.v, i.mask)
    assert isinstance(out, Tensor)
    return out


def run_attention_backward(i: AttentionInputs) -> tuple[Tensor, ...]:
    """dq, dk, dv."""
    assert i.out is not None
    return torch.autograd.grad(i.out, (i.q, i.k, i.v), i.upstream, retain_graph=True)


def attention_flops(i: AttentionInputs) -> int:
    """Of the forward, by the full square whatever the mask."""
    batch, heads, length, width = i.q.shape
    return 4 * batch * heads * length**2 * width


def attention_sizes(i: AttentionInputs) -> dict[str, int]:
    """As kernel_plan takes them."""
    batch, heads, length, width = i.q.shape
    return {"B": batch, "H": heads, "Hkv": i.k.shape[1], "L": length, "D": width, "masks": int(i.mask is not None)}
