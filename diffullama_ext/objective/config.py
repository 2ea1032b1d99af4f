# SPDX-License-Identifier: Apache-2.0
"""The choices in which the published objectives differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..checks import check_choice, check_int, check_range
from ..schedules import BlockLengthCurriculum
from .time import check_time

NORMALIZERS = ("tokens", "masked", "sequence", "batch")
LOSS_MASKS = ("draw", "equality")
LOSS_WEIGHTS = ("elbo", "uniform", "cart")
NOISES = ("mask", "mix")
VIEWS = ("single", "nested", "complementary")

# What the released code of each system does.
RECIPES: dict[str, dict[str, Any]] = {
    "diffullama": {"shift": True, "normalizer": "masked", "loss_mask": "equality"},
    "llada": {"shift": False, "normalizer": "tokens"},
    "llada_sft": {"shift": False, "normalizer": "sequence"},
    "dream": {"shift": True, "normalizer": "tokens", "loss_weight": "cart"},
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The choices in which the published objectives differ; ``recipe`` has theirs, docs/objective.md the formulas.

    Attributes:
        mask_id: id of the mask token.
        shift: logits row i predicts token i+1 (an adapted AR model).
        t_min, t_max: t is uniform in (t_min, t_max].
        strata: see :func:`draw_t`.
        antithetic: the samples numbered 2i and 2i+1 take noise levels that mirror each other in (t_min, t_max].
        normalizer: "tokens" (the ELBO per token), "masked", "sequence" or "batch": see
            :func:`diffullama_ext.shifted_cross_entropy`.
        loss_mask: "draw" scores the tokens that were noised; "equality" every token with ``xt == mask_id``, which also
            takes real tokens that happen to have that id (the released DiffuLLaMA code).
        loss_weight: of a scored token. "elbo" is 1/t, "uniform" is 1, and "cart" (Dream) grows with the visible tokens
            near it, geometrically in their distance, with parameter ``cart_p``.
        cart_p: in (0, 1).
        exact_count: of n maskable tokens exactly ceil(t n) are masked, and t becomes that share (LLaDA's likelihood);
            otherwise each is masked with probability t. With blocks, of each block.
        views: noised copies of a sample, made from one draw. "single"; "nested": two, at two independent levels (of
            which strata bind one), the noised tokens of the first among those of the second; "complementary": two, at t
            and 1 - t, each token masked in exactly one. Both count in loss and normaliser: the loss is their mean.
        noise: "mask", or "mix" (BARD): some tokens become random ones instead of the mask.
        vocab_size: random tokens are below it; "mix" needs it.
        block_length: None is diffusion over the whole sequence; otherwise blocks of so many tokens, each noised at its
            own level and predicted from itself and the clean blocks before it (BD3-LM). The model reads 2 L tokens.
        block_length_start, block_length_steps: the length doubles from start to block_length over so many optimiser
            steps (see :class:`diffullama_ext.schedules.BlockLengthCurriculum`); None and 0: from the start.
        distill_weight: of the divergence from a teacher; 0 is none.
        distill_top_k: the teacher's tokens that count.
        distill_temperature: of both distributions.
        teacher_block_length: None is the student's.
        teacher_shift: None is ``shift``.
    """

    mask_id: int
    shift: bool = True
    t_min: float = 1e-3
    t_max: float = 1.0
    strata: int = 0
    antithetic: bool = False
    normalizer: str = "tokens"
    loss_mask: str = "draw"
    loss_weight: str = "elbo"
    cart_p: float = 0.3
    exact_count: bool = False
    views: str = "single"
    noise: str = "mask"
    vocab_size: int | None = None
    block_length: int | None = None
    block_length_start: int | None = None
    block_length_steps: int = 0
    distill_weight: float = 0.0
    distill_top_k: int = 16
    distill_temperature: float = 1.0
    teacher_block_length: int | None = None
    teacher_shift: bool | None = None

    def __post_init__(self) -> None:
        check_int("mask_id", self.mask_id, 0, 2**63 - 1)
        check_time(self.t_min, self.t_max, self.strata, self.antithetic)
        check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("loss_mask", self.loss_mask, LOSS_MASKS)
        check_choice("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        if not 0.0 < self.cart_p < 1.0:
            raise ValueError(f"cart_p must be in (0, 1), got {self.cart_p!r}")
        check_choice("views", self.views, VIEWS)
        self._check_noise()
        self._check_blocks()
        self._check_distillation()

    def _check_noise(self) -> None:
        check_choice("noise", self.noise, NOISES)
        if self.vocab_size is not None:
            check_int("vocab_size", self.vocab_size, 2, 2**31)
        if self.noise != "mix":
            return
        if self.vocab_size is None:
            raise ValueError("vocab_size must be given with noise='mix': random tokens are drawn below it")
        other = {"views": "complementary", "loss_mask": "equality", "exact_count": True}
        for name, value in other.items():
            if getattr(self, name) == value:
                raise ValueError(f"{name}={value!r} has no meaning with noise='mix', whose tokens are not all masks")

    def _check_blocks(self) -> None:
        if self.block_length is not None:
            check_int("block_length", self.block_length, 1, 2**31 - 1)
        elif self.block_length_start is not None:
            raise ValueError(f"block_length must be given with block_length_start={self.block_length_start}")
        if self.teacher_block_length is not None:
            check_int("teacher_block_length", self.teacher_block_length, 1, 2**31 - 1)
            if self.block_length is None:
                raise ValueError(
                    f"block_length must be given with teacher_block_length={self.teacher_block_length}: the teacher "
                    "reads the student's two streams"
                )
        self.block_lengths()

    def _check_distillation(self) -> None:
        check_range("distill_weight", self.distill_weight, 0.0, math.inf)
        check_int("distill_top_k", self.distill_top_k, 1, 2**31 - 1)
        check_range("distill_temperature", self.distill_temperature, 0.0, math.inf, low_open=True)
        if self.teacher_shift and not self.shift:
            raise ValueError("teacher_shift must be False without shift: none of its rows predicts the first token")

    @classmethod
    def recipe(cls, name: str, *, mask_id: int, **changes: Any) -> ObjectiveConfig:
        """What a released code does, with ``changes``: "diffullama", "llada" (pre-training), "llada_sft" or "dream"."""
        check_choice("recipe", name, tuple(RECIPES))
        return cls(mask_id=mask_id, **{**RECIPES[name], **changes})

    @property
    def n_views(self) -> int:
        """Noised copies of a sample."""
        return 1 if self.views == "single" else 2

    def block_lengths(self) -> BlockLengthCurriculum | None:
        """The block length by optimiser step; None without blocks."""
        if self.block_length is None:
            return None
        start = self.block_length if self.block_length_start is None else self.block_length_start
        return BlockLengthCurriculum(start, self.block_length, self.block_length_steps)
