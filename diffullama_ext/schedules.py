# SPDX-License-Identifier: Apache-2.0
"""What changes with time: the noise level, the attention annealing, and how many tokens a sampling step commits."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearNoise:
    """alpha_t = 1 - t: a token is masked with probability t, and a masked token's loss weighs 1/t (the ELBO)."""

    def p_mask(self, t: Tensor) -> Tensor:
        """Masking probability 1 - alpha_t, of t's shape."""
        return t

    def loss_weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t), of t's shape."""
        return t.reciprocal()


@dataclass(frozen=True)
class AttentionAnnealing:
    """attn_mask_ratio by optimiser step: min(1, (step + 1) / anneal_steps), from causal (0) to bidirectional (1).

    anneal_steps = 0 is bidirectional from the start. Source: Gong et al. (ICLR 2025), released trainer.
    """

    anneal_steps: int

    def __post_init__(self) -> None:
        if self.anneal_steps < 0:
            raise ValueError(f"anneal_steps must be at least 0, got {self.anneal_steps}")

    def __call__(self, step: int) -> float:
        """Ratio at optimiser step ``step`` (0-based)."""
        return 1.0 if self.anneal_steps == 0 else min(1.0, (step + 1) / self.anneal_steps)


def commit_quota(n_masked: Tensor, steps_left: int | Tensor) -> Tensor:
    """Tokens to commit now so that the rest can be spread evenly over the steps left: ceil(n_masked / steps_left).

    Applied step after step, it commits every token in exactly ``steps_left`` steps or fewer, for any numbers.

    Args:
        n_masked: [B] int64.
        steps_left: at least 1; an int, or int64 [B] (whose values are not looked at).
    """
    if isinstance(steps_left, int) and steps_left < 1:
        raise ValueError(f"steps_left must be at least 1, got {steps_left}")
    return -(-n_masked // steps_left)
