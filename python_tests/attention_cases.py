# SPDX-License-Identifier: Apache-2.0
"""Masks, inputs and the exact result for tests of the attention kernels."""

from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from comparison import assert_no_worse_than_torch
from torch import Tensor

from diffullama_ext import AttentionMask, attention

MASK_CLASSES = ("none", "full", "causal", "annealed", "blocks", "documents", "bits", "bits of each", "dead rows")
PADDINGS = ("", "left", "right", "holes")
HEADS = ((1, 1), (8, 2), (7, 1), (2, 2), (2, 1))


@dataclass(frozen=True)
class Case:
    """One call."""

    q_length: int
    k_length: int
    width: int
    dtype: torch.dtype
    heads: tuple[int, int] = (2, 1)  # of queries, of keys
    mask: str = "none"
    padding: str = ""
    batch: int = 2

    def __str__(self) -> str:
        lengths = str(self.q_length) if self.q_length == self.k_length else f"{self.q_length}x{self.k_length}"
        names = (f"L{lengths}", f"D{self.width}", str(self.dtype)[6:], "H{}/{}".format(*self.heads), self.mask)
        return " ".join([*names, *([f"{self.padding} padding"] if self.padding else [])])


class Inputs(NamedTuple):
    """What a case makes; allowed and key_padding say the same as mask, densely."""

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    mask: AttentionMask | None
    key_padding: Tensor | None
    allowed: Tensor  # bool [M, Lq, Lk], key padding included


def make_mask(name: str, batch: int, q_length: int, k_length: int, device: str) -> AttentionMask | None:
    """The masks of two lengths are made of bits where their constructor knows one length only."""
    rows, columns = torch.arange(q_length, device=device), torch.arange(k_length, device=device)
    if name == "none":
        return None
    if name == "full":
        return AttentionMask.full(q_length, k_length, device=device)
    if name == "causal" and q_length == k_length:
        return AttentionMask.causal(q_length, device=device)
    if name == "annealed" and q_length == k_length:
        return AttentionMask.annealed(q_length, 0.3, seed=5, step=2, device=device)
    if name == "blocks":  # of 64: whole tiles
        return AttentionMask.block_causal(rows // 64, columns // 64)
    if name == "documents":
        return AttentionMask.documents(rows // 50, columns // 50)
    dense = torch.rand(batch if name == "bits of each" else 1, q_length, k_length, device=device) < 0.4
    if name == "dead rows":
        dense[:, ::3] = False
    return AttentionMask.from_dense(dense)


def make_padding(side: str, batch: int, k_length: int, device: str) -> Tensor | None:
    """The first sequence is not padded; of the last one no more than one key is left, or the holes."""
    if not side:
        return None
    position = torch.arange(k_length, device=device)
    real = torch.linspace(k_length, 1, batch, device=device).long()[:, None]
    if side == "right":
        return position < real
    if side == "left":
        return position >= k_length - real
    holes = torch.rand(batch, k_length, device=device) < 0.7
    holes[0] = True
    return holes


def inputs_of(case: Case, device: str) -> Inputs:
    """Normal values; leaves that ask for gradients."""
    b, d, (h, hkv) = case.batch, case.width, case.heads
    sizes = ((h, case.q_length), (hkv, case.k_length), (hkv, case.k_length), (h, case.q_length))
    q, k, v, upstream = (torch.randn(b, n, length, d).to(device, case.dtype) for n, length in sizes)
    mask = make_mask(case.mask, b, case.q_length, case.k_length, device)
    key_padding = make_padding(case.padding, b, case.k_length, device)
    allowed = torch.ones(1, case.q_length, case.k_length, dtype=torch.bool, device=device)
    if mask is not None:
        allowed = mask.to_dense()
    if key_padding is not None:
        allowed = allowed & key_padding[:, None]
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream, mask, key_padding, allowed)


def run(i: Inputs, scale: float | None = None, impl: str = "ext", deterministic: bool = True) -> list[Tensor]:
    """[out, lse, dq, dk, dv]; the same bits every time."""
    options: dict[str, Any] = {"scale": scale, "key_padding": i.key_padding, "deterministic": deterministic}
    out, lse = attention(i.q, i.k, i.v, i.mask, **options, return_lse=True, impl=impl)
    return [out.detach(), lse, *torch.autograd.grad(out, (i.q, i.k, i.v), i.upstream)]


def exact(i: Inputs, scale: float | None = None) -> list[Tensor]:
    """The same in float64, by the definition."""
    q, k, v = (x.detach().double().requires_grad_() for x in (i.q, i.k, i.v))
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT) * (q.shape[3] ** -0.5 if scale is None else scale)
    allowed = i.allowed[:, None].expand(scores.shape)
    dead = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~(allowed | dead), -torch.inf)
    p = torch.softmax(scores, -1) * ~dead
    out = p @ v.repeat_interleave(group, 1)
    lse = torch.logsumexp(scores.detach(), -1).masked_fill(dead[..., 0], -torch.inf)
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), i.upstream.double())]


def torch_own(i: Inputs, scale: float | None = None) -> list[Tensor]:
    """[out, dq, dk, dv] of scaled_dot_product_attention in the dtype of the inputs, under the dense mask."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (i.q, i.k, i.v))
    dead = ~i.allowed.any(-1, keepdim=True)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=(i.allowed[:, None] | dead).expand(q.shape[0], -1, -1, -1), scale=scale, enable_gqa=True
    ).masked_fill(dead, 0.0)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), i.upstream)]


def assert_accurate(i: Inputs, scale: float | None = None) -> None:
    """Output and gradients lose at most twice what torch's attention does; the logsumexp is float32's."""
    out, lse, *gradients = run(i, scale, deterministic=False)
    true_out, true_lse, *true_gradients = exact(i, scale)
    plain = torch_own(i, scale)
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isfinite(), true_lse.isfinite())
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    for ours, truth, low in zip((out, *gradients), (true_out, *true_gradients), plain, strict=True):
        assert ours.dtype == i.q.dtype
        # Gradients that cancel (a query with one key has none) are as exact as the float32 products they cancel from.
        assert_no_worse_than_torch(ours, truth, low, noise=2.0**-20 * i.q.shape[3] ** 0.5)


def cases(lengths: tuple[int, ...], widths: tuple[int, ...]) -> list[Case]:
    """Every length, width and dtype; masks, heads and paddings take turns of coprime periods, so that all meet."""
    masks, heads, paddings = cycle(MASK_CLASSES), cycle(HEADS), cycle(PADDINGS)
    return [
        Case(length, length, width, dtype, next(heads) if width < 96 else (2, 1), next(masks), next(paddings))
        for dtype in (torch.bfloat16, torch.float16)
        for width in widths
        for length in lengths
    ]
