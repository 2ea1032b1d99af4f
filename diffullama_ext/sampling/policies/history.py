# SPDX-License-Identifier: Apache-2.0
"""Policies that commit where the predicted distribution has stopped moving: KLASS and AHD.

Both keep log-probabilities of every position in float32: B * L * V * 4 bytes a step of history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_range
from ...functional import TokenStats
from ..state import Decision, State
from .base import Policy, most_confident
from .registry import register


def log_probs(state: State) -> tuple[Tensor, Tensor]:
    """Of the model without the mask token, float32 [N, V], and the positions [N] (b * L + j) that they score."""
    assert state.scored is not None
    logits = state.scored.logits.float()
    if state.mask_id < logits.shape[1]:
        logits = logits.index_fill(1, torch.tensor([state.mask_id], device=logits.device), -torch.inf)
    return logits.log_softmax(dim=1), state.scored.at


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities [..., V]; NaN where q is NaN."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(dim=-1)


def _history(state: State, slots: int, vocab: int) -> Tensor:
    """Log-probabilities of the last steps by step % slots, [slots, B * L, V]; NaN where there are none yet."""
    if "log_probs" not in state.memory:
        size = (slots, state.xt.numel(), vocab)
        state.memory["log_probs"] = torch.full(size, torch.nan, device=state.xt.device)
    return state.memory["log_probs"]


@register("klass")
@dataclass(frozen=True)
class KLASSPolicy(Policy):
    """Commit what is confident and has been stable: KL(P_t || P_(t-1)) < ``kl`` in each of the last ``history`` steps.

    Where the stable ones are fewer than the quota (one, with steps=None), the most confident others make it up.

    Source: KLASS (Kim et al. 2025), defaults of its released code.
    """

    adaptive: ClassVar[bool] = True
    beyond_block: ClassVar[bool] = True

    threshold: float = 0.9
    kl: float = 0.01
    history: int = 2

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0.0, math.inf)
        check_range("kl", self.kl, 0.0, math.inf)
        check_int("history", self.history, 1, 2**31 - 1)

    def rows(self, state: State) -> Tensor:
        """Later blocks too, for their history."""
        return state.masked

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """The stable ones, or the most confident."""
        new, at = log_probs(state)
        old = _history(state, 1, new.shape[1])[0]
        stable_steps = state.memory.get("stable_steps", torch.zeros_like(state.xt)).flatten()
        moved = kl_divergence(new, old[at])
        stable_steps = stable_steps.index_copy(0, at, torch.where(moved < self.kl, stable_steps[at] + 1, 0))
        old[at] = new
        state.memory["stable_steps"] = stable_steps.view_as(state.xt)
        sure = (state.memory["stable_steps"] >= self.history) & (stats.prob >= self.threshold) & state.active
        count = torch.maximum(sure.sum(dim=1), state.quota())
        return Decision(most_confident(state, stats.token, torch.where(sure, 2.0, stats.prob), count))


@register("ahd")
@dataclass(frozen=True)
class AHDPolicy(Policy):
    """The threshold rule in the current block; in later blocks, every position whose distribution has been stable.

    Stable is D < ``tolerance``, D = sum over tau = 1..history-1 of w_tau KL(P_t || P_(t-tau)), w_tau proportional to
    exp(-decay tau). Before there are ``history`` steps nothing is stable. Needs ``block_length`` to make a difference.

    It follows the published description, without its code: ``decay`` is not given there, 1.0 is our choice.

    Source: AHD (anchor-based history-stable decoding, arXiv 2604.08964, ACL 2026).
    """

    adaptive: ClassVar[bool] = True
    beyond_block: ClassVar[bool] = True

    threshold: float = 0.9
    tolerance: float = 0.01
    history: int = 6
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0.0, math.inf)
        check_range("tolerance", self.tolerance, 0.0, math.inf)
        check_int("history", self.history, 2, 2**31 - 1)
        check_range("decay", self.decay, -math.inf, math.inf)

    def rows(self, state: State) -> Tensor:
        """Later blocks too."""
        return state.masked

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """Confident ones of this block, stable ones of the next."""
        new, at = log_probs(state)
        slots = self.history - 1
        past = _history(state, slots, new.shape[1])
        moved = torch.zeros_like(new[:, 0])
        weights = [math.exp(-self.decay * tau) for tau in range(1, self.history)]
        for tau, weight in enumerate(weights, start=1):
            moved += weight / sum(weights) * kl_divergence(new, past[(state.step - tau) % slots, at])
        past[state.step % slots, at] = new
        drift = torch.full((state.xt.numel(),), torch.nan, device=at.device).index_copy(0, at, moved)
        ahead = (drift.view_as(state.xt) < self.tolerance) & state.masked & ~state.active
        sure = state.active & (stats.prob >= self.threshold)
        return Decision(sure | most_confident(state, stats.token, stats.prob) | ahead)
