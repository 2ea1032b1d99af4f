# SPDX-License-Identifier: Apache-2.0
"""EB: as many positions as an entropy budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_choice, check_range
from ...functional import TokenStats
from ..state import Decision, State
from .base import Policy, most_confident, ranked
from .registry import register

ORDERS = ("confidence", "entropy", "margin")


@register("entropy_budget")
@dataclass(frozen=True)
class EntropyBudgetPolicy(Policy):
    """Commit the longest prefix, best first, whose entropies H satisfy sum(H) - max(H) <= gamma; at least the quota.

    sum(H) - max(H) bounds how much the tokens committed together can depend on each other (in nats).

    Attributes:
        gamma: the budget; 0 commits one position, and those that are certain.
        order: best by "confidence" (of the drawn token), "entropy" or "margin".

    Source: EB-Sampler (Ben-Hamu et al., arXiv 2505.24857).
    """

    adaptive: ClassVar[bool] = True

    gamma: float = 0.001
    order: str = "confidence"

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0, math.inf)
        check_choice("order", self.order, ORDERS)

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """The prefix within the budget, and no fewer than the quota."""
        by_order = {"confidence": stats.prob, "entropy": -stats.entropy, "margin": stats.p1 - stats.p2}
        score: Tensor = by_order[self.order]
        eligible = state.active & (stats.token >= 0)
        rank = ranked(score, eligible)
        order = rank.argsort(dim=1, stable=True)
        entropy = torch.where(eligible, stats.entropy.double(), torch.inf).gather(1, order)
        spent = entropy.cumsum(dim=1) - entropy.cummax(dim=1).values  # [B, L], rising; NaN past the last eligible
        n_within = (spent <= self.gamma).sum(dim=1)
        return Decision(most_confident(state, stats.token, score, torch.maximum(n_within, state.quota())))
