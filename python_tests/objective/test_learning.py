# SPDX-License-Identifier: Apache-2.0
"""A model learns a rule by every kind of objective: each token is the one before it plus one."""

from typing import Any

import pytest
import torch
from objective_cases import adapted, objective
from tiny_models import MASK_ID
from torch import Tensor

KINDS: dict[str, dict[str, Any]] = {
    "elbo": {"strata": 16},
    "no shift": {"shift": False, "antithetic": True},
    "cart": {"loss_weight": "cart"},
    "complementary": {"views": "complementary", "exact_count": True},
    "mix": {"noise": "mix", "vocab_size": 20, "loss_weight": "uniform"},
    "blocks": {"block_length": 8, "block_length_start": 2, "block_length_steps": 30},
}
LENGTH = 16


def counting(batch: int, step: int) -> Tensor:
    """[B, L] tokens 8, 9, 10, 11 in a cycle, from a start that depends on the sample."""
    start = torch.randint(4, (batch, 1), generator=torch.Generator().manual_seed(step))
    x0 = 8 + (start + torch.arange(LENGTH)) % 4
    assert not (x0 == MASK_ID).any()
    return x0


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_rule_is_learned(kind: dict[str, Any]) -> None:
    model, goal = adapted(initializer_range=0.05).train(), objective(**kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    nll = []
    for step in range(90):
        x0 = counting(16, step)
        maskable = torch.arange(LENGTH).expand(16, -1) > 0  # the start is given, else there is nothing to know
        out = goal(model, x0, maskable=maskable, seed=1, step=step, sample_index=16 * step + torch.arange(16))
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        nll.append((out.stats.nll_sum / out.stats.n_scored).item())
    assert nll[0] > 3.0
    assert sum(nll[-10:]) / 10 < 1.1, "clearly below log 4, which is left without a look at the other tokens"
