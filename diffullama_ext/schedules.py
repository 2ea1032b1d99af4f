# SPDX-License-Identifier: Apache-2.0
"""What changes with time: noise level, attention annealing, block length, and the tokens a sampling step commits."""

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


@dataclass(frozen=True)
class BlockLengthCurriculum:
    """Block length by optimiser step: ``start``, doubled at even intervals, ``final`` from step ``steps`` on.

    final = start * 2^n; the n lengths below final share the ``steps`` before it. Source: BARD (Bard-VL) merges blocks
    4, 8, 16, 32 in stages.
    """

    start: int
    final: int
    steps: int = 0

    def __post_init__(self) -> None:
        if self.start < 1:
            raise ValueError(f"block_length_start must be at least 1, got {self.start}")
        if self.steps < 0:
            raise ValueError(f"block_length_steps must be at least 0, got {self.steps}")
        ratio, rest = divmod(self.final, self.start)
        if rest or ratio & (ratio - 1) or ratio < 1:
            raise ValueError(f"block_length must be block_length_start * 2^n, got {self.final} and {self.start}")
        if (self.steps > 0) != (ratio > 1):
            raise ValueError(
                f"block_length_steps must be 0 exactly where the length stays, got {self.steps} for {self.start} to "
                f"{self.final}"
            )

    def __call__(self, step: int) -> int:
        """Block length at optimiser step ``step`` (0-based)."""
        if step >= self.steps:
            return self.final
        n_doublings = (self.final // self.start).bit_length() - 1
        return self.start << (step * n_doublings // self.steps)


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
