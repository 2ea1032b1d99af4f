# SPDX-License-Identifier: Apache-2.0
"""Policies that commit as many positions as the schedule says: ceil(masked / steps_left), the best first."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from ...checks import check_range
from ...functional import TokenStats
from ..state import Decision, State
from .base import Policy, check_confidence, most_confident, uniform
from .registry import register


@dataclass(frozen=True)
class _QuotaPolicy(Policy):
    """Commit the top ``state.quota()`` of each row by :meth:`score`.

    Attributes:
        noise: 0 takes the best. Above it, positions are drawn without replacement with probabilities
            softmax(score / noise), by Gumbel-top-k (``alg_temp`` of Dream).
    """

    noise: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_range("noise", self.noise, 0.0, math.inf)

    @abstractmethod
    def score(self, stats: TokenStats) -> Tensor:
        """Higher is committed first, [B, L]."""

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """The quota of each row."""
        score = self.score(stats)
        if self.noise > 0:
            score = (score.double() / self.noise - uniform(state).log().neg().log()).float()
        return Decision(most_confident(state, stats.token, score))


@register("confidence")
@dataclass(frozen=True)
class ConfidencePolicy(_QuotaPolicy):
    """Commit the most confident positions, as many as the schedule says.

    Attributes:
        confidence: "prob" or "sample_prob", see ``CONFIDENCES``.
        noise: of the choice, 0 for none; see above.

    Source: LLaDA (Nie et al. 2025, "low confidence remasking"), after MaskGIT; Dream (Ye et al. 2025, "maskgit_plus");
    DiffuLLaMA's confidence sampler, with the quota taken over what is still masked.
    """

    confidence: str = "prob"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_confidence(self.confidence)

    def score(self, stats: TokenStats) -> Tensor:
        """The probability of the drawn token."""
        confidence: Tensor = getattr(stats, self.confidence)
        return confidence


@register("margin")
@dataclass(frozen=True)
class MarginPolicy(_QuotaPolicy):
    """Commit where the best token leads the second best most clearly: p1 - p2 of the model's distribution.

    Source: Dream (Ye et al. 2025), "topk_margin" (there, of the tempered distribution).
    """

    def score(self, stats: TokenStats) -> Tensor:
        """p1 - p2."""
        return stats.p1 - stats.p2


@register("entropy")
@dataclass(frozen=True)
class EntropyPolicy(_QuotaPolicy):
    """Commit where the model's distribution has the least entropy.

    Source: Dream (Ye et al. 2025), "entropy" (there, of the tempered distribution).
    """

    def score(self, stats: TokenStats) -> Tensor:
        """Negative entropy."""
        return -stats.entropy
