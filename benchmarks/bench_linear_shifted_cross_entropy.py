# SPDX-License-Identifier: Apache-2.0
"""linear_shifted_cross_entropy, forward and backward, beside the full logits and beside the masked rows' logits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Bench, gradients
from diffullama_ext import linear_shifted_cross_entropy


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    x0: Tensor
    masked: Tensor
    loss_weight: Tensor  # [B]


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    batch, length, width, vocab = (shape[name] for name in ("batch", "length", "width", "vocab"))
    hidden = torch.randn(batch, length, width, device=device, dtype=shape["dtype"]).requires_grad_()
    weight = (torch.randn(vocab, width, device=device, dtype=shape["dtype"]) * width**-0.5).requires_grad_()
    masked = torch.rand(batch, length, device=device) < shape["p"]
    x0 = torch.randint(0, vocab, (batch, length), device=device)
    return Inputs(hidden, weight, x0, masked, torch.full((batch,), 1 / shape["p"], device=device))


def ext(i: Inputs) -> tuple[Tensor, ...]:
    loss, _ = linear_shifted_cross_entropy(i.hidden, i.weight, i.x0, i.masked, loss_weight=i.loss_weight, impl="ext")
    return gradients(loss, (i.hidden, i.weight))


def shifted_targets(i: Any) -> tuple[Tensor, Tensor]:
    """(targets [B * L] of every row, -100 where none is scored, and their loss weights): no copy of the logits."""
    targets = torch.nn.functional.pad(i.x0.masked_fill(~i.masked, -100)[:, 1:], (0, 1), value=-100)
    return targets.flatten(), i.loss_weight[:, None].expand_as(i.x0).flatten()


def full_logits(i: Inputs) -> tuple[Tensor, ...]:
    logits = torch.nn.functional.linear(i.hidden, i.weight).flatten(0, 1)
    targets, weights = shifted_targets(i)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return gradients((nll * weights).sum() / i.masked[:, 1:].numel(), (i.hidden, i.weight))


def masked_rows(i: Inputs) -> tuple[Tensor, ...]:
    """What an engineer who minds the memory writes: only the rows that predict a masked token."""
    b, j = i.masked[:, 1:].nonzero(as_tuple=True)
    logits = torch.nn.functional.linear(i.hidden[b, j], i.weight)
    nll = torch.nn.functional.cross_entropy(logits, i.x0[b, j + 1], reduction="none")
    loss = (nll * i.loss_weight[b]).sum() / i.masked[:, 1:].numel()
    return gradients(loss, (i.hidden, i.weight))


def agree(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, peer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


BENCH = Bench(
    "linear_shifted_cross_entropy",
    shapes.LOSS,
    make,
    {"ext": ext, "full logits": full_logits, "masked rows": masked_rows},
    agree,
    against="full logits",
    speedup={"4x512x256x16384": 1.7},
    memory={"4x512x256x16384": 0.25},
)


@BENCH.parametrize()
def bench_linear_shifted_cross_entropy(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
