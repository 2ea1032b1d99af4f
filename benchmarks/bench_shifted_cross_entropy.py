# SPDX-License-Identifier: Apache-2.0
"""shifted_cross_entropy, forward and backward from given logits, beside torch's cross_entropy with shifted targets."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.bench_linear_shifted_cross_entropy import shifted_targets
from benchmarks.harness import Bench, gradients
from diffullama_ext import shifted_cross_entropy


class Inputs(NamedTuple):
    logits: Tensor
    x0: Tensor
    masked: Tensor
    loss_weight: Tensor  # [B]


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    batch, length, vocab = (shape[name] for name in ("batch", "length", "vocab"))
    logits = torch.randn(batch, length, vocab, device=device, dtype=shape["dtype"]).requires_grad_()
    masked = torch.rand(batch, length, device=device) < shape["p"]
    x0 = torch.randint(0, vocab, (batch, length), device=device)
    return Inputs(logits, x0, masked, torch.full((batch,), 1 / shape["p"], device=device))


def ext(i: Inputs) -> tuple[Tensor, ...]:
    loss, _ = shifted_cross_entropy(i.logits, i.x0, i.masked, loss_weight=i.loss_weight, impl="ext")
    return gradients(loss, (i.logits,))


def all_rows(i: Inputs) -> tuple[Tensor, ...]:
    targets, weights = shifted_targets(i)
    nll = torch.nn.functional.cross_entropy(i.logits.flatten(0, 1), targets, reduction="none")
    return gradients((nll * weights).sum() / i.masked[:, 1:].numel(), (i.logits,))


def masked_rows(i: Inputs) -> tuple[Tensor, ...]:
    b, j = i.masked[:, 1:].nonzero(as_tuple=True)
    nll = torch.nn.functional.cross_entropy(i.logits[b, j], i.x0[b, j + 1], reduction="none")
    return gradients((nll * i.loss_weight[b]).sum() / i.masked[:, 1:].numel(), (i.logits,))


def agree(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, peer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


BENCH = Bench(
    "shifted_cross_entropy",
    shapes.LOSS_HALF,
    make,
    {"ext": ext, "all rows": all_rows, "masked rows": masked_rows},
    agree,
    against="all rows",
)


@BENCH.parametrize()
def bench_shifted_cross_entropy(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
