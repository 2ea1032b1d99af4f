# SPDX-License-Identifier: Apache-2.0
"""One loop for the three trainings of the demo, so that they differ in nothing but the loss and the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LossOf = Callable[[Tensor, Tensor, int], Tensor]  # (x0 [B, L] int64, sample_index [B] int64, step) -> scalar
Progress = Callable[[int, int, float], None]  # (steps done, steps in all, loss)
Observe = Callable[[int, float, float], None]  # (step, loss, gradient norm before it is clipped)


@dataclass(frozen=True)
class Samples:
    """Which blocks a training sees: samples first_sample, first_sample + 1, ... of an endless shuffled stream."""

    blocks: Tensor  # [N, L] int32
    first_sample: int
    seed: int

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """(x0 [B, L] int64, sample_index [B] int64) of a step."""
        start = self.first_sample + step * batch_size
        index = torch.arange(start, start + batch_size)
        epoch, place = index // len(self.blocks), index % len(self.blocks)
        order = torch.cat([self._order(int(e))[place[epoch == e]] for e in epoch.unique()])
        return self.blocks[order].long(), index

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(self.seed + epoch))


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: nn.Module,
    samples: Samples,
    loss_of: LossOf,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    bf16: bool = False,
    progress: Progress | None = None,
    observe: Observe | None = None,
    stop: int | None = None,
) -> list[float]:
    """Train ``model`` in place with AdamW; returns the loss of every step.

    ``stop`` ends the training after so many of its ``steps``, which the learning rate still goes by.

    Raises:
        RuntimeError: the loss is not finite.
    """
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    model.train()
    losses = []
    for step in range(steps if stop is None else min(stop, steps)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate)
        x0, index = (x.to(device) for x in samples.batch(step, batch_size))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(x0, index, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss became {losses[-1]} at step {step} of {steps}")
        if observe is not None:
            observe(step, losses[-1], norm.item())
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    return losses
