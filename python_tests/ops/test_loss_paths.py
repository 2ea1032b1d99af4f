# SPDX-License-Identifier: Apache-2.0
"""The vocabulary sizes at which the CUDA loss kernel changes how it holds a row; on the CPU ordinary cases."""

import pytest
import torch
from loss_cases import linear_case
from oracles import dense_nll
from torch import Tensor

from diffullama_ext import linear_shifted_cross_entropy

pytestmark = [pytest.mark.op("linear_shifted_cross_entropy"), pytest.mark.ext]

# A block of 512 threads holds 4, 8 or 16 vectors of 16 bytes a thread, or reads the row again.
ELEMENTS = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
HELD = [4, 8, 16]


def _gradients(
    inputs: list[Tensor], x0: Tensor, masked: Tensor, loss_weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    loss, _ = linear_shifted_cross_entropy(
        leaves[0], leaves[1], x0, masked, bias=leaves[2], loss_weight=loss_weight, reduction="sum", impl="ext"
    )
    return loss, list(torch.autograd.grad(loss, leaves))


def _truth(inputs: list[Tensor], x0: Tensor, masked: Tensor, loss_weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    logits = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2])
    loss = (loss_weight.double() * dense_nll(logits, x0, masked, True)).sum()
    return loss, list(torch.autograd.grad(loss, leaves))


def _relative_error(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("held", [*HELD, 17])
@pytest.mark.parametrize("offset", [-3, 0, 5], ids=["short tail", "whole vectors", "ragged tail"])
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_every_way_to_hold_a_row(device: str, dtype: torch.dtype, held: int, offset: int) -> None:
    vocab = 512 * ELEMENTS[dtype] * held + offset
    case = linear_case(1, 5, 2, vocab, device)
    case.masked[:] = torch.tensor([[True, True, False, True, True]])
    case.x0[0, 1], case.x0[0, 3] = vocab - 1, 0  # the ends of a row
    inputs = [x.to(dtype) for x in (case.hidden, case.weight, case.bias)]
    weight = torch.linspace(1.0, 2.0, 5, device=device)[None]
    arguments = (case.x0, case.masked, weight)
    loss, grads = _gradients(inputs, *arguments, dtype)
    truth, true_grads = _truth(inputs, *arguments)
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    for got, expected in zip((loss, *grads), (truth, *true_grads), strict=True):
        assert _relative_error(got, expected) < allowed


def test_more_columns_than_a_chunk_holds(device: str) -> None:
    """chunk_rows, and a bound far above the count: rows past the last token add nothing."""
    case = linear_case(2, 40, 3, 70, device, torch.float32)
    weight = torch.rand(2, 40, device=device)
    losses = []
    for chunk_rows, max_scored in ((None, None), (7, 80), (80, 80), (1, None)):
        loss, _ = linear_shifted_cross_entropy(
            case.hidden,
            case.weight,
            case.x0,
            case.masked,
            loss_weight=weight,
            chunk_rows=chunk_rows,
            max_scored=max_scored,
            impl="ext",
        )
        losses.append((loss, *torch.autograd.grad(loss, (case.hidden, case.weight))))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0])
