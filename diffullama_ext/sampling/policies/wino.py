# SPDX-License-Identifier: Apache-2.0
"""WINO-style: accept generously, and check what was accepted without looking at it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_range
from ...functional import TokenStats
from ..state import Decision, State
from .base import Policy, most_confident, ranked
from .registry import register


@register("wino")
@dataclass(frozen=True)
class WINOPolicy(Policy):
    """Accept masked positions above a low threshold; mask visible ones again that their context does not support.

    Accepted: c > ``threshold``, the best first, at most clamp(0.7 masked, 5, 20) and at least one. Masked again: tokens
    of the current block, committed before, whose probability is below ``verify`` in the shadow block: the same
    positions once more as masks, which see all but their own token and are seen by none. The least probable first, and
    fewer than the last step accepted, so that it ends.

    Attributes:
        threshold: tau1. verify: tau2; 0 takes nothing back.
        accept_at_least, accept_at_most: bounds of the number accepted, where that many are above the threshold.

    Source: WINO (Hong et al., arXiv 2507.18578), in the caps and
    counts of d2Cache's re-implementation; not compared with the authors' code.
    """

    adaptive: ClassVar[bool] = True
    verifies: ClassVar[bool] = True

    threshold: float = 0.7
    verify: float = 0.9
    accept_at_least: int = 5
    accept_at_most: int = 20

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0.0, math.inf)
        check_range("verify", self.verify, 0.0, math.inf)
        check_int("accept_at_least", self.accept_at_least, 1, 2**31 - 1)
        check_int("accept_at_most", self.accept_at_most, self.accept_at_least, 2**31 - 1)

    def rows(self, state: State) -> Tensor:
        """The current block, its visible tokens too."""
        return state.in_block

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """Accept, and take back from what was visible before."""
        cap = (state.active.sum(dim=1) * 7 // 10).clamp(self.accept_at_least, self.accept_at_most)
        n_sure = (state.active & (stats.prob > self.threshold)).sum(dim=1)
        count = torch.maximum(torch.minimum(n_sure, cap), state.quota())  # the quota is at least 1
        commit = most_confident(state, stats.token, stats.prob, count)

        last = state.memory.get("accepted", torch.zeros_like(state.steps))
        doubted = state.in_block & ~state.masked & (stats.current_prob < self.verify)
        remask = ranked(-stats.current_prob, doubted) < (last - 1)[:, None]
        state.memory["accepted"] = commit.sum(dim=1)
        return Decision(commit, remask)
