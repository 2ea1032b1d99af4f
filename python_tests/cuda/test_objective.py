# SPDX-License-Identifier: Apache-2.0
"""The objective on CUDA: the number of scored tokens reaches the host on its own; the loss is the CPU's."""

from typing import Any

import objective_cases as cases
import pytest
import torch
from torch import Tensor

from diffullama_ext import objective as module
from diffullama_ext.functional import linear_shifted_cross_entropy

pytestmark = [pytest.mark.cuda, pytest.mark.ext]


@pytest.mark.parametrize("normalizer", ["tokens", "masked"])
def test_the_host_knows_how_many_tokens_are_scored(normalizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[int | None] = []

    def noting(*tensors: Tensor, **options: Any) -> Any:
        bounds.append(options["max_scored"])
        return linear_shifted_cross_entropy(*tensors, **options)

    x0, objective = cases.tokens(), cases.objective(normalizer=normalizer)
    expected = objective(cases.adapted(), x0, **cases.CALL)
    monkeypatch.setattr(module, "linear_shifted_cross_entropy", noting)
    got = objective(cases.adapted().cuda(), x0.cuda(), **cases.CALL)
    assert bounds == [int(got.masked.sum())]
    assert torch.equal(got.masked.cpu(), expected.masked)
    torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-5)
