# SPDX-License-Identifier: Apache-2.0
"""ReMDM: ancestral sampling that masks tokens again and keeps the marginals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import check_choice, check_range
from ...functional import TokenStats, unmask
from ..state import Decision, State
from .base import Policy, check_confidence, uniform
from .registry import register

VARIANTS = ("cap", "rescale", "conf")


@register("remdm")
@dataclass(frozen=True)
class ReMDMPolicy(Policy):
    """Mask visible tokens again with probability sigma; reveal with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).

    With alpha_t = 1 - t, S steps for the block and s of them left: sigma_max = min(1, (1 - alpha_s) / alpha_t) =
    min(1, (s - 1) / (S - s)), and a masked position is revealed with probability (1 + sigma (S - s)) / s. As for
    "random", a step reveals at least one position; a row whose last mask goes is through.

    Attributes:
        variant: "cap": sigma = min(eta, sigma_max); "rescale": sigma = eta sigma_max; "conf": sigma_max shared out by
            a softmax over visible tokens of minus their probability when they were committed (masked ones: sigma = 0).
        eta: in [0, 1]; the authors tune it by the number of steps (about 0.005 to 0.05). "conf" has none.
        confidence: "prob" or "sample_prob", see ``CONFIDENCES``: of "conf".

    Source: ReMDM (Wang et al. 2025), section 4 and its released code.
    """

    adaptive: ClassVar[bool] = True

    variant: str = "cap"
    eta: float = 0.02
    confidence: str = "prob"

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_range("eta", self.eta, 0.0, 1.0)
        check_confidence(self.confidence)

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """Both draws, each with its own random word."""
        left, past = state.steps_left.double(), (state.block_steps - state.steps_left).double()  # s, S - s
        sigma_max = ((left - 1) / past).nan_to_num(nan=0.0).clamp(max=1.0)  # [B]; 0 / 0: the only step
        visible = state.in_block & ~state.masked
        reveal = sigma_max.new_zeros(())
        if self.variant == "conf":
            committed_prob = state.memory.get("committed_prob", torch.full_like(stats.prob, torch.nan))
            share = torch.where(visible, -committed_prob.double(), -torch.inf).softmax(dim=1)
            sigma = share.nan_to_num(nan=0.0) * sigma_max[:, None]  # [B, L]
        else:
            row = sigma_max.clamp(max=self.eta) if self.variant == "cap" else self.eta * sigma_max
            sigma, reveal = row[:, None], row * past
        commit = unmask(
            state.xt,
            state.active,
            stats.token,
            stats.prob,
            ((1.0 + reveal) / left).float(),
            rule="random",
            seed=state.seed,
            step=state.step,
            sample_index=state.sample_index,
        ).committed
        if self.variant == "conf":
            state.memory["committed_prob"] = torch.where(commit, getattr(stats, self.confidence), committed_prob)
        return Decision(commit, visible & (uniform(state) < sigma))
