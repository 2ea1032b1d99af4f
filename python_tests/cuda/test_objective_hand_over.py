# SPDX-License-Identifier: Apache-2.0
"""On CUDA the number of scored tokens reaches the host by itself, so that the loss need not ask the device."""

from typing import Any

import objective_cases as cases
import pytest
import torch
from torch import Tensor

from diffullama_ext.functional import linear_shifted_cross_entropy
from diffullama_ext.objective import loss as module


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """max_scored of every loss that the objective computes."""
    seen: list[int | None] = []

    def noting(*tensors: Tensor, **options: Any) -> Any:
        seen.append(options["max_scored"])
        return linear_shifted_cross_entropy(*tensors, **options)

    monkeypatch.setattr(module, "linear_shifted_cross_entropy", noting)
    return seen


def test_the_cpu_op_counts_itself(bounds: list[int | None]) -> None:
    cases.objective()(cases.adapted(), cases.tokens(), **cases.CALL)
    assert bounds == [None]


@pytest.mark.cuda
@pytest.mark.parametrize("loss_mask", ["draw", "equality"])
def test_the_cuda_op_gets_the_count(loss_mask: str, bounds: list[int | None]) -> None:
    x0, objective = cases.tokens(), cases.objective(loss_mask=loss_mask)
    expected = objective(cases.adapted(), x0, **cases.CALL)
    got = objective(cases.adapted().cuda(), x0.cuda(), **cases.CALL)
    assert bounds == [None, int(got.masked.sum())]
    assert torch.equal(got.masked.cpu(), expected.masked)
    torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-5)
