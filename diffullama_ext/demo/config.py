# SPDX-License-Identifier: Apache-2.0
"""The sizes of a demo run. Steps are fixed, not timed, so that a run can be repeated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..checks import check_choice, check_int


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides the figures of a run, with the machine's rounding.

    Attributes:
        vocab_size: of the adapted model: the tokenizer's, and the mask token.
        length, layers, width, heads: of the GPT-2; length is that of the blocks.
        batch_size: blocks a step.
        ar_steps: autoregressive steps. diffusion_steps: of the adaptation, and of the training from scratch.
        anneal_steps: steps from causal to bidirectional attention, in both.
        ar_learning_rate, learning_rate: peaks, of the autoregressive and of the diffusion training.
        heldout_blocks: held-out blocks that the figures are taken on. draws: noise levels each (EvaluationConfig).
        corpus_chars: how much of the corpus to read; None is all.
        samples: texts sampled, and snippets infilled. sample_steps: forwards for each.
        seed: of weights, order, noise and samples.
        bf16: autocast.
    """

    vocab_size: int = 2048
    length: int = 64
    layers: int = 3
    width: int = 160
    heads: int = 5
    batch_size: int = 32
    ar_steps: int = 700
    diffusion_steps: int = 450
    anneal_steps: int = 150
    ar_learning_rate: float = 2e-3
    learning_rate: float = 1e-3
    heldout_blocks: int = 256
    draws: int = 8
    corpus_chars: int | None = None
    samples: int = 4
    sample_steps: int = 32
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "layers", "width", "heads", "batch_size", "ar_steps", "diffusion_steps", "samples"):
            check_int(name, getattr(self, name), 1, 2**31 - 1)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.anneal_steps > self.diffusion_steps:
            raise ValueError(
                f"anneal_steps must be at most diffusion_steps, got {self.anneal_steps} and {self.diffusion_steps}: "
                "the model would never have seen the attention that it is sampled with"
            )

    @classmethod
    def preset(cls, name: str, *, seed: int = 0) -> DemoConfig:
        """The sizes "cpu" (minutes on two cores), "cuda" (a larger model) or "quick" (seconds, to test the path)."""
        check_choice("preset", name, ("cpu", "cuda", "quick"))
        if name == "cpu":
            return cls(seed=seed)
        if name == "quick":
            return cls(
                vocab_size=512,
                length=32,
                layers=2,
                width=64,
                heads=2,
                ar_steps=150,
                diffusion_steps=60,
                anneal_steps=20,
                heldout_blocks=64,
                draws=4,
                corpus_chars=600_000,
                samples=1,
                sample_steps=8,
                seed=seed,
            )
        return cls(
            vocab_size=4096,
            length=256,
            layers=8,
            width=512,
            heads=8,
            batch_size=64,
            ar_steps=1000,
            diffusion_steps=1000,
            anneal_steps=300,
            ar_learning_rate=1e-3,
            learning_rate=6e-4,
            heldout_blocks=512,
            samples=8,
            sample_steps=128,
            seed=seed,
            bf16=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
