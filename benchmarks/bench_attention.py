# SPDX-License-Identifier: Apache-2.0
"""attention forward and backward under an annealed mask, beside scaled_dot_product_attention with the dense mask."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Bench, gradients
from diffullama_ext import AttentionMask, attention


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    mask: AttentionMask
    dense: Tensor
    dout: Tensor


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    size = (shape["batch"], shape["heads"], shape["length"], shape["width"])
    q, k, v, dout = (torch.randn(size, device=device, dtype=shape["dtype"]) for _ in range(4))
    mask = AttentionMask.annealed(size[2], 0.3, seed=7, device=device)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mask, mask.to_dense(), dout)


def ext(i: Inputs) -> tuple[Tensor, ...]:
    out = attention(i.q, i.k, i.v, i.mask, impl="ext")
    assert isinstance(out, Tensor)
    return gradients((out * i.dout).sum(), (i.q, i.k, i.v))


def eager(i: Inputs) -> tuple[Tensor, ...]:
    out = torch.nn.functional.scaled_dot_product_attention(i.q, i.k, i.v, attn_mask=i.dense)
    return gradients((out * i.dout).sum(), (i.q, i.k, i.v))


def agree(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, peer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


BENCH = Bench("attention", shapes.ATTENTION, make, {"ext": ext, "sdpa": eager}, agree, against="sdpa")


@BENCH.parametrize()
def bench_attention(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
