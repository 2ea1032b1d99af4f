# SPDX-License-Identifier: Apache-2.0
"""Which of the drawn tokens a step commits: one small class a policy, all over :func:`diffullama_ext.unmask`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checks import check_choice, check_range
from ..functional import TokenStats, unmask
from .state import Decision, State

# What "confidence" may mean, by its field of TokenStats: the token's probability under the model's own distribution
# (LLaDA, Fast-dLLM), or the probability it was drawn with, after temperature, top-k and top-p (DiffuLLaMA, Dream).
CONFIDENCES = ("prob", "sample_prob")


@runtime_checkable
class Policy(Protocol):
    """Decides, step after step, what is committed and what is masked again. Subclass it, or match it.

    Policies hold parameters only; what a run needs from step to step goes into ``state.memory``. All that a policy
    computes stays on the device, and a row's decision depends on that row alone. In every row with a mask each step
    commits at least one position, and by the last of ``state.steps`` all are; :func:`fill` raises otherwise.

    Attributes:
        adaptive: rows may be through before their steps are, so it is worth asking the device after every step. Other
            policies do not make the host wait for a GPU.
    """

    adaptive: ClassVar[bool] = False

    def rows(self, state: State) -> Tensor:
        """The positions whose statistics :meth:`decide` needs, bool [B, L]; by default what may be committed."""
        return state.active

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """What to write, from statistics [B, L] (token -1 and NaN outside of :meth:`rows`)."""
        ...


@dataclass(frozen=True)
class RandomPolicy(Policy):
    """Reveal each masked position with probability (alpha_s - alpha_t) / (1 - alpha_t), from time t down to s.

    With alpha_t = 1 - t in equal steps this is 1 / steps_left: certain in the last step. Where chance reveals nothing
    in a row, the position nearest to being revealed is, so that no forward is wasted.
    Source: Gong et al. (ICLR 2025), Algorithm 2; the ancestral sampler of MDLM (Sahoo et al. 2024).
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


@dataclass(frozen=True)
class ConfidencePolicy(Policy):
    """Commit the most confident positions, as many as the schedule says: ceil(masked / steps_left).

    Attributes:
        confidence: "prob" or "sample_prob", see ``CONFIDENCES``.

    Source: LLaDA (Nie et al. 2025, "low confidence remasking"), after MaskGIT; DiffuLLaMA's confidence sampler, with
    the quota taken over what is still masked.
    """

    confidence: str = "prob"

    def __post_init__(self) -> None:
        check_choice("confidence", self.confidence, CONFIDENCES)

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """The top ``state.quota()`` of each row."""
        return Decision(_most_confident(stats, state, self.confidence))


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
        check_range("threshold", self.threshold, 0.0, float("inf"))
        check_choice("confidence", self.confidence, CONFIDENCES)

    def decide(self, stats: TokenStats, state: State) -> Decision:
        """All at or above the threshold, and no fewer than the quota."""
        confidence = getattr(stats, self.confidence)
        threshold = torch.full_like(confidence[:, 0], self.threshold)
        sure = unmask(state.xt, state.active, stats.token, confidence, threshold, rule="threshold").committed
        return Decision(sure | _most_confident(stats, state, self.confidence))


def _most_confident(stats: TokenStats, state: State, confidence: str) -> Tensor:
    """The quota of each row, by confidence; bool [B, L]."""
    quota = state.quota().float()
    return unmask(state.xt, state.active, stats.token, getattr(stats, confidence), quota, rule="quota").committed


POLICIES: dict[str, type[Policy]] = {
    "random": RandomPolicy,
    "confidence": ConfidencePolicy,
    "threshold": ThresholdPolicy,
}


def make_policy(name: str, **parameters: object) -> Policy:
    """A policy by name, with parameters of its class.

    Raises:
        ValueError: no such policy, or it has no such parameter; from the policy itself, a value out of range.
    """
    check_choice("policy", name, tuple(POLICIES))
    known = [f.name for f in fields(POLICIES[name])]  # type: ignore[arg-type]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"policy {name!r} has the parameters {known}, got {parameter!r}")
    return POLICIES[name](**parameters)


def as_policy(policy: str | Policy) -> Policy:
    """A name with its defaults, or the policy itself."""
    if isinstance(policy, str):
        return make_policy(policy)
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise TypeError(f"policy must be one of {', '.join(map(repr, POLICIES))} or a Policy, got {policy!r}")
    return policy
