# SPDX-License-Identifier: Apache-2.0
"""Policies that look at no statistic: the order of unmasking is chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...functional import TokenStats, unmask
from ..state import Decision, State
from .base import Policy, most_confident, uniform
from .registry import register


@register("random")
@dataclass(frozen=True)
class RandomPolicy(Policy):
    """Reveal each masked position with probability (alpha_s - alpha_t) / (1 - alpha_t), from time t down to s.

    With alpha_t = 1 - t in equal steps this is 1 / steps_left: certain in the last step. Where chance reveals nothing
    in a row, the position nearest to being revealed is, so that no forward is wasted.
    Source: Gong et al. (ICLR 2025), Algorithm 2.
    """

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """By the random word of (seed, step, sample, position)."""
        commit = unmask(
            state.xt,
            state.active,
            stats.token,
            stats.prob,
            state.steps_left.float().reciprocal(),
            rule="random",
            seed=state.seed,
            step=state.step,
            sample_index=state.sample_index,
        ).committed
        return Decision(commit)


@register("ancestral")
@dataclass(frozen=True)
class AncestralPolicy(Policy):
    """The same probabilities, each position for itself: a step may reveal nothing.

    The ancestral sampler q(x_s | x_t) of the absorbing process, without a correction. The positions left in the last
    step are drawn like all others (the released sampler takes their argmax).
    Source: MDLM (Sahoo et al., NeurIPS 2024).
    """

    may_wait: ClassVar[bool] = True

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """Where a uniform number is below 1 / steps_left."""
        return Decision(state.active & (uniform(state) < state.steps_left.double().reciprocal()[:, None]))


@register("first_hitting")
@dataclass(frozen=True)
class FirstHittingPolicy(Policy):
    """Reveal positions chosen uniformly, as many as the schedule says; by default one a step.

    A model without a time input needs no times: the order of first hits is a uniform permutation, and every forward
    reveals something. Source: Zheng et al. (ICLR 2025, "Masked diffusion models are secretly time-agnostic"), in the
    form of BD3-LM (Arriola et al., ICLR 2025). With ``steps``: "random" remasking of LLaDA (Nie et al. 2025).
    """

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """The quota of each row, by a uniform number."""
        return Decision(most_confident(state, stats.token, uniform(state).float()))
