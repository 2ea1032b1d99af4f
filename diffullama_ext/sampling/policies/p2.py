# SPDX-License-Identifier: Apache-2.0
"""P2: plan which positions should be masked, whatever they are now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_range
from ...functional import TokenStats
from ..state import Decision, State
from .base import Policy, check_confidence, ranked
from .registry import register


@register("p2")
@dataclass(frozen=True)
class P2Policy(Policy):
    """After step i of T, the floor((1 - i / T) n) worst of the block's n positions are masked, visible ones included.

    The score of a masked position is the log probability of the token drawn for it, that of a visible one ``eta`` times
    the log probability of its token, as the model sees it now. Masked positions that are not among the worst are
    committed, visible ones that are become masks again.

    Attributes:
        eta: above 1 revises more, below 1 less; 0 never.
        confidence: "prob" or "sample_prob", see ``CONFIDENCES``: of masked positions.

    Source: P2, path planning with the model as its own planner (Peng et al. 2025).
    """

    adaptive: ClassVar[bool] = True
    may_wait: ClassVar[bool] = True

    eta: float = 1.0
    confidence: str = "prob"

    def __post_init__(self) -> None:
        check_range("eta", self.eta, 0.0, math.inf)
        check_confidence(self.confidence)

    def rows(self, state: State) -> Tensor:
        """The current block, its visible tokens too."""
        return state.in_block

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """Swap until as many are masked as the schedule says."""
        drawn: Tensor = getattr(stats, self.confidence)
        # eta * 0 for a visible token of probability 0 and eta = 0: NaN is what eta = 0 shall ignore.
        visible = (self.eta * stats.current_prob.log()).nan_to_num(nan=0.0, neginf=-torch.inf)
        score = torch.where(state.masked, drawn.log().nan_to_num(nan=-torch.inf, neginf=-torch.inf), visible)
        n_masked = state.in_block.sum(dim=1) * (state.steps_left - 1) // state.block_steps
        worst = ranked(-score, state.in_block) < n_masked[:, None]
        return Decision(state.active & ~worst, state.in_block & ~state.masked & worst)
