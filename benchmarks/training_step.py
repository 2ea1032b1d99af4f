# SPDX-License-Identifier: Apache-2.0
"""One training step, ours and in plain PyTorch, for the benchmarks of training on CPU and GPU.

The plain step makes an additive annealed mask, all logits [B, L, V] and F.cross_entropy, as the published code does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig, draw_t

RATIO = 0.5  # of the annealed attention
Loss = Callable[[Any, Tensor, int], Tensor]  # of (model, x0 [B, L], step)


def _numbers(x0: Tensor, step: int) -> Tensor:
    return step * len(x0) + torch.arange(len(x0), device=x0.device)


def plain_loss(mask_id: int) -> Loss:
    """In plain PyTorch, with the model's own attention under a dense mask."""

    def loss(model: Any, x0: Tensor, step: int) -> Tensor:
        batch, length = x0.shape
        t = draw_t(_numbers(x0, step), 0, strata=batch)
        masked = torch.rand(x0.shape, device=x0.device) < t[:, None]
        xt = torch.where(masked, mask_id, x0)
        visible = torch.rand(length, length, device=x0.device) < RATIO
        visible |= torch.ones_like(visible).tril()
        bias = torch.zeros(1, 1, length, length, dtype=model.dtype, device=x0.device)
        bias = bias.masked_fill(~visible, torch.finfo(model.dtype).min)
        logits = model(xt, attention_mask=bias.expand(batch, 1, length, length), use_cache=False).logits
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), x0[:, 1:].flatten(), reduction="none").view(batch, -1)
        return (nll * masked[:, 1:] / t[:, None]).sum() / (batch * (length - 1))

    return loss


def own_loss(mask_id: int, batch: int) -> Loss:
    """Of the objective, for an adapted model and batches of so many samples."""
    objective = DiffusionObjective(ObjectiveConfig(mask_id, strata=batch))

    def loss(model: Any, x0: Tensor, step: int) -> Tensor:
        return objective(model, x0, attn_mask_ratio=RATIO, seed=0, step=step, sample_index=_numbers(x0, step)).loss

    return loss


def timed_step(model: Any, optimiser: torch.optim.Optimizer, loss: Loss, x0: Tensor, step: int) -> float:
    """Seconds of one whole step: gradients cleared, loss, backward, clipping, optimiser."""
    start = time.perf_counter()
    optimiser.zero_grad()
    loss(model, x0, step).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    if x0.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
