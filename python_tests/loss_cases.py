# SPDX-License-Identifier: Apache-2.0
"""Inputs that the tests of the linear losses share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffullama_ext import linear_shifted_cross_entropy

OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "both": {"label_smoothing": 0.3, "softcap": 2.0},
}
REDUCTIONS = ["mean", "sum", "none"]


class Case(NamedTuple):
    """Inputs of one call; leaves require a gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    x0: Tensor
    masked: Tensor
    loss_weight: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def loss(self, **options: Any) -> Tensor:
        given: dict[str, Any] = {"bias": self.bias, "loss_weight": self.loss_weight} | options
        return linear_shifted_cross_entropy(self.hidden, self.weight, self.x0, self.masked, **given)[0]

    def gradients(self, loss: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.leaves, upstream)


def linear_case(
    batch: int, length: int, width: int, vocab: int, device: str, dtype: torch.dtype = torch.float64
) -> Case:
    leaves = (torch.randn(shape, dtype=torch.float64) for shape in ((batch, length, width), (vocab, width), (vocab,)))
    hidden, weight, bias = (x.to(device, dtype).requires_grad_() for x in leaves)
    x0, masked = torch.randint(0, vocab, (batch, length)), torch.rand(batch, length) < 0.5
    loss_weight = 0.5 + torch.rand(batch, length, dtype=torch.float64)
    return Case(hidden, weight, bias, x0.to(device), masked.to(device), loss_weight.to(device))


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    leaves = (x.detach().to(dtype).requires_grad_() for x in case.leaves)
    return case._replace(**dict(zip(("hidden", "weight", "bias"), leaves, strict=True)))
