# SPDX-License-Identifier: Apache-2.0
"""Prophet: stop refining once the answer is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_range
from ...functional import TokenStats
from ..state import Decision, State
from .base import Policy, check_confidence, most_confident
from .registry import register


@register("prophet")
@dataclass(frozen=True)
class ProphetPolicy(Policy):
    """The quota by confidence, until the mean logit gap of the answer reaches a threshold; then all that is left.

    The gap is the largest logit less the second, of every position of the answer, masked or not. The threshold falls
    with progress p = step / steps: ``early`` for p < 0.33, ``middle`` for p < 0.67, then ``late``. What is left takes
    the tokens drawn in that step (the argmax at temperature 0).

    Attributes:
        answer_start: first position of the answer, counted among the row's maskable ones; None is all of them.
        answer_length: positions of the answer, where there is a start.

    Source: Prophet (Li et al., arXiv 2508.19982, ICLR 2026), thresholds and length of its released code.
    """

    adaptive: ClassVar[bool] = True
    beyond_block: ClassVar[bool] = True

    answer_start: int | None = None
    answer_length: int = 5
    early: float = 7.5
    middle: float = 5.0
    late: float = 2.5
    confidence: str = "prob"

    def __post_init__(self) -> None:
        if self.answer_start is not None:
            check_int("answer_start", self.answer_start, 0, 2**31 - 1)
        check_int("answer_length", self.answer_length, 1, 2**31 - 1)
        for name in ("early", "middle", "late"):
            check_range(name, getattr(self, name), 0.0, math.inf)
        check_confidence(self.confidence)

    def _answer(self, state: State) -> Tensor:
        if self.answer_start is None:
            return state.maskable
        ordinal = state.maskable.cumsum(dim=1) - 1
        inside = (ordinal >= self.answer_start) & (ordinal < self.answer_start + self.answer_length)
        return state.maskable & inside

    def rows(self, state: State) -> Tensor:
        """All masked positions, and the answer."""
        return state.masked | self._answer(state)

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """The quota, or everything."""
        answer = self._answer(state)
        gap = torch.where(answer, stats.gap.double(), 0.0).sum(dim=1) / answer.sum(dim=1)  # NaN without an answer
        progress = state.step / state.steps.clamp(min=1).double()
        needed = torch.full_like(gap, self.late)
        needed = needed.masked_fill(progress < 0.67, self.middle).masked_fill(progress < 0.33, self.early)
        quota = most_confident(state, stats.token, getattr(stats, self.confidence))
        return Decision(torch.where((gap >= needed)[:, None], state.masked, quota))
