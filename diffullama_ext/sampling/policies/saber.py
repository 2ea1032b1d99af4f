# SPDX-License-Identifier: Apache-2.0
"""Saber: accept by a threshold that adapts, and take back what turned out shaky."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import check_int
from ...functional import TokenStats
from ..state import Decision, State
from .base import Policy, most_confident, ranked
from .registry import register


@register("saber")
@dataclass(frozen=True)
class SaberPolicy(Policy):
    """Commit all surer than what was committed before, on average; mask again where certainty fell the most.

    Accepted are the masked positions with c > mean of the confidences of all commits so far (1 before the first), and
    no fewer than n. Then r = min(max(n // 2, ceil(k / 8)), k - 1) tokens of the block are masked again, k = max(n,
    accepted): those whose largest probability rose least, or fell most, since the last step. A finished block stays.

    With several blocks, only tokens of the current one are taken back (the released loop reaches into earlier ones).

    Attributes:
        n: tokens to accept at least, in each step.

    Source: Saber (arXiv 2510.18165, ACL 2026), as in its released code.
    """

    adaptive: ClassVar[bool] = True

    n: int = 2

    def __post_init__(self) -> None:
        check_int("n", self.n, 1, 2**31 - 1)

    def rows(self, state: State) -> torch.Tensor:
        """The current block, its visible tokens too."""
        return state.in_block

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """Accept, then take back."""
        last = state.memory.get("largest_prob", torch.zeros_like(stats.p1))
        accepted_prob = state.memory.get("accepted_prob", torch.full_like(stats.p1, torch.nan))
        known = ~accepted_prob.isnan()
        mean = torch.where(known, accepted_prob.double(), 0.0).sum(dim=1) / known.sum(dim=1)
        sure = state.active & (stats.prob > mean.nan_to_num(nan=1.0)[:, None])

        count = torch.maximum(sure.sum(dim=1).clamp(min=self.n), state.quota())
        commit = most_confident(state, stats.token, stats.prob, count)
        k = commit.sum(dim=1).clamp(min=self.n)
        n_back = torch.minimum(((k + 7) // 8).clamp(min=self.n // 2), k - 1)
        n_back = torch.where((state.active & ~commit).any(dim=1), n_back, 0)
        change = (stats.p1 - last).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        remask = ranked(-change, state.in_block & (~state.masked | commit)) < n_back[:, None]

        state.memory["largest_prob"] = torch.where(state.in_block, stats.p1, -torch.inf)
        state.memory["accepted_prob"] = torch.where(commit, stats.prob, accepted_prob)
        return Decision(commit, remask)
