# SPDX-License-Identifier: Apache-2.0
"""unmask beside batched topk, sort and scatter: no Python loop over sequences, as a careful engineer would write it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Bench
from diffullama_ext import Unmasked, unmask


class Inputs(NamedTuple):
    xt: Tensor
    masked: Tensor
    token: Tensor
    confidence: Tensor
    amount: Tensor  # [B]
    rule: str


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    size = (shape["batch"], shape["length"])
    token, xt = (torch.randint(0, 50000, size, device=device) for _ in range(2))
    masked = torch.rand(size, device=device) < 0.5
    amount = torch.full(size[:1], shape["amount"], device=device)
    return Inputs(xt, masked, token, torch.rand(size, device=device), amount, shape["rule"])


def ext(i: Inputs) -> Unmasked:
    return unmask(i.xt, i.masked, i.token, i.confidence, i.amount, rule=i.rule, impl="ext")


def _quota(i: Inputs, confidence: Tensor) -> Tensor:
    most = int(i.amount.max())  # a schedule knows it on the host
    order = confidence.topk(most, dim=1).indices
    taken = torch.arange(most, device=order.device) < i.amount[:, None]
    return torch.zeros_like(i.masked).scatter_(1, order, taken)


def _threshold(i: Inputs, confidence: Tensor) -> Tensor:
    return (confidence >= i.amount[:, None]).scatter_(1, confidence.argmax(dim=1, keepdim=True), True)


def _factor(i: Inputs, confidence: Tensor) -> Tensor:
    ranked, order = confidence.sort(dim=1, descending=True)
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    passes = (ranked >= 1.0 - i.amount[:, None] / (rank + 2)).to(torch.int32).cumprod(dim=1).bool() | (rank == 0)
    return torch.zeros_like(i.masked).scatter_(1, order, passes)


def eager(i: Inputs) -> Unmasked:
    confidence = i.confidence.masked_fill(~i.masked, -torch.inf)
    choose = {"quota": _quota, "threshold": _threshold, "factor": _factor}[i.rule]
    committed = choose(i, confidence) & i.masked
    return Unmasked(torch.where(committed, i.token, i.xt), committed, (i.masked & ~committed).sum(dim=1))


def agree(ours: Unmasked, peer: Unmasked) -> None:
    for a, b in zip(ours, peer, strict=True):
        assert torch.equal(a, b)


BENCH = Bench(
    "unmask",
    shapes.UNMASK,
    make,
    {"ext": ext, "topk/scatter": eager},
    agree,
    against="topk/scatter",
    speedup={"64x2048-quota": 2.0},
)


@BENCH.parametrize()
def bench_unmask(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
