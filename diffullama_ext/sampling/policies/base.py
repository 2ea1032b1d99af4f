# SPDX-License-Identifier: Apache-2.0
"""What a policy is, and the choices that several make."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...checks import check_choice
from ...functional import TokenStats, unmask
from ...functional.random import position_words
from ..state import Decision, State

# What "confidence" may mean, by its field of TokenStats: the token's probability under the model's own distribution
# (LLaDA, Fast-dLLM), or the probability it was drawn with, after temperature, top-k and top-p (DiffuLLaMA, Dream).
CONFIDENCES = ("prob", "sample_prob")


@runtime_checkable
class Policy(Protocol):
    """Decides, step after step, what is committed and what is masked again. Subclass it, or match it.

    Policies hold parameters only, as fields of a frozen dataclass; what a run needs from step to step goes into
    ``state.memory``. All that a policy computes stays on the device, and a row's decision depends on that row alone. By
    the last of a block's steps (``state.steps_left`` is 1) it commits all of the block; :func:`fill` raises otherwise.

    Attributes:
        adaptive: rows may be through before their steps are, so it is worth asking the device before they are.
        may_wait: a step may commit nothing in a row with masks; otherwise :func:`fill` raises where that happens.
        beyond_block: :meth:`rows` asks for masked positions of later blocks too.
        verifies: ``stats.current_prob`` shall be of a model that does not see the token it judges (WINO's shadow
            block), which the denoiser must offer.
    """

    adaptive: ClassVar[bool] = False
    may_wait: ClassVar[bool] = False
    beyond_block: ClassVar[bool] = False
    verifies: ClassVar[bool] = False

    def rows(self, state: State) -> Tensor:
        """The maskable positions whose statistics :meth:`decide` needs, bool [B, L]; by default the active ones."""
        return state.active

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """What to write, from statistics [B, L] (token -1 and NaN outside of :meth:`rows`)."""
        ...


def check_confidence(value: str) -> None:
    """One of ``CONFIDENCES``."""
    check_choice("confidence", value, CONFIDENCES)


def most_confident(state: State, token: Tensor, confidence: Tensor, count: Tensor | None = None) -> Tensor:
    """The ``count`` [B] (by default the quota) most confident active positions of each row, bool [B, L]."""
    count = state.quota() if count is None else count
    return unmask(state.xt, state.active, token, confidence, count.float(), rule="quota").committed


def uniform(state: State) -> Tensor:
    """A number in (0, 1) for every position, float64 [B, L], of (seed, step, sample, position)."""
    words = position_words(state.xt.shape[1], seed=state.seed, step=state.step, sample_index=state.sample_index)
    return (words.double() + 0.5) * 2.0**-32


def ranked(score: Tensor, eligible: Tensor) -> Tensor:
    """Rank of every eligible position by falling score, ties to the lowest position; [B, L], L elsewhere."""
    length = score.shape[1]
    order = torch.sort(torch.where(eligible, score, -torch.inf), dim=1, descending=True, stable=True).indices
    order = order.gather(1, torch.sort((~eligible).gather(1, order).byte(), dim=1, stable=True).indices)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(length, device=score.device).expand_as(order))
    return torch.where(eligible, rank, length)
