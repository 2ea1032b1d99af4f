# SPDX-License-Identifier: Apache-2.0
"""Policies that commit all they are sure of, however many that are (Fast-dLLM)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_range
from ...functional import TokenStats, unmask
from ..state import Decision, State
from .base import Policy, check_confidence, most_confident
from .registry import register


def _decide(stats: TokenStats, state: State, confidence: str, rule: str, amount: float) -> Decision:
    """What the rule of :func:`diffullama_ext.unmask` accepts, and no fewer than the quota."""
    score: Tensor = getattr(stats, confidence)
    bound = torch.full_like(score[:, 0], amount)
    sure = unmask(state.xt, state.active, stats.token, score, bound, rule=rule).committed
    return Decision(sure | most_confident(state, stats.token, score))


@register("threshold")
@dataclass(frozen=True)
class ThresholdPolicy(Policy):
    """Commit every position at least this confident, and always the most confident one.

    Where ``steps`` is given, a step also commits no fewer than the schedule's quota, so that the row is through by then
    (SDAR, BARD, MinerU-Diffusion: "low confidence dynamic"); with steps=None that quota is the one most confident.

    Attributes:
        threshold: at least 0; 0 commits all at once, above 1 one position a step.
        confidence: "prob" or "sample_prob", see ``CONFIDENCES``.

    Source: Fast-dLLM (Wu et al. 2025), confidence-aware parallel decoding.
    """

    adaptive: ClassVar[bool] = True

    threshold: float = 0.9
    confidence: str = "prob"

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0.0, math.inf)
        check_confidence(self.confidence)

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """All at or above the threshold, and no fewer than the quota."""
        return _decide(stats, state, self.confidence, "threshold", self.threshold)


@register("factor")
@dataclass(frozen=True)
class FactorPolicy(Policy):
    """Commit the longest prefix c_1 >= c_2 >= ... of the confidences with c_n >= 1 - factor / (n + 1), at least one.

    The more tokens at once, the surer each must be: with (n + 1) (1 - c_n) < 1 the n most likely tokens are also the
    most likely together. Quota and confidence as for "threshold".

    Source: Fast-dLLM (Wu et al. 2025), factor-based parallel decoding.
    """

    adaptive: ClassVar[bool] = True

    factor: float = 1.0
    confidence: str = "prob"

    def __post_init__(self) -> None:
        check_range("factor", self.factor, 0.0, math.inf)
        check_confidence(self.confidence)

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """The prefix, and no fewer than the quota."""
        return _decide(stats, state, self.confidence, "factor", self.factor)
