# SPDX-License-Identifier: Apache-2.0
"""A held-out figure with its standard error, and the paired difference of two."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums over independent sequences: a mean per token, an accuracy.

    Attributes:
        mean: sum of numerators over sum of denominators; NaN where the denominators sum to 0.
        stderr: its standard error over sequences (linearised ratio estimator); NaN for a single sequence.
        n: sequences.
        residuals: float64 [n], what each sequence adds to the error; pairs two estimates on the same sequences.
    """

    mean: float
    stderr: float
    n: int
    residuals: Tensor = field(repr=False, compare=False)

    @classmethod
    def ratio(cls, numerator: Tensor, denominator: Tensor) -> Estimate:
        """From the sums of each sequence, both [n]."""
        numerator, denominator = numerator.double().cpu(), denominator.double().cpu()
        if numerator.dim() != 1 or numerator.shape != denominator.shape:
            raise ValueError(
                f"numerator and denominator must be [n], got {list(numerator.shape)} and {list(denominator.shape)}"
            )
        total = denominator.sum()
        mean = numerator.sum() / total
        return cls._of(float(mean), (numerator - mean * denominator) / total)

    @classmethod
    def _of(cls, mean: float, residuals: Tensor) -> Estimate:
        n = residuals.numel()
        stderr = math.sqrt(n / (n - 1) * float(residuals.square().sum())) if n > 1 else math.nan
        return cls(mean, stderr, n, residuals)

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference: both estimates must be over the same sequences, in the same order."""
        if self.n != other.n:
            raise ValueError(f"a paired difference needs the same sequences, got {self.n} and {other.n}")
        return self._of(self.mean - other.mean, self.residuals - other.residuals)

    def __str__(self) -> str:
        return f"{self.mean:.3f}±{self.stderr:.3f}"

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN."""
        figures = {"mean": self.mean, "stderr": self.stderr}
        return {key: None if math.isnan(value) else value for key, value in figures.items()} | {"n": self.n}


def concatenated(parts: list[tuple[Tensor, Tensor]]) -> Estimate:
    """The estimate from (numerator, denominator) of several batches of sequences."""
    numerators, denominators = zip(*parts, strict=True)
    return Estimate.ratio(torch.cat(numerators), torch.cat(denominators))
