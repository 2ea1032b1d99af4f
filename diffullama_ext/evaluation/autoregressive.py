# SPDX-License-Identifier: Apache-2.0
"""The left-to-right loss that the model started from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention_mask import AttentionMask
from .diffusion import Progress, check_blocks, evaluating, masked_scores
from .estimate import Estimate, concatenated


def autoregressive_loss(
    model: Any, blocks: Tensor, *, batch_size: int = 32, progress: Progress | None = None
) -> Estimate:
    """Next-token loss per token, in nats, with causal attention.

    Args:
        model: a causal language model of transformers. An adapted one is run with a causal mask: what of its old skill
            is left.
        blocks: [N, L] int32 or int64 held-out tokens; token 0 of a block is not predicted.
        batch_size: blocks a forward; it changes no figure beyond rounding.
        progress: called with (batches done, batches in all).
    """
    check_blocks(blocks)
    device = next(model.parameters()).device
    adapted = not getattr(model.config, "is_causal", True)
    forward: dict[str, Any] = {}
    if adapted:
        forward["diffusion_mask"] = AttentionMask.causal(blocks.shape[1], device=device)
    batches = blocks.split(batch_size)
    parts = []
    with evaluating(model):
        for done, batch in enumerate(batches, start=1):
            x0 = batch.long().to(device)
            scored = torch.ones_like(x0, dtype=torch.bool)
            scored[:, 0] = False
            nll = masked_scores(model, x0, x0, scored, shift=True, **forward)[0].reshape(len(x0), -1)
            parts.append((nll.double().sum(dim=1), scored.sum(dim=1)))
            if progress is not None:
                progress(done, len(batches))
    return concatenated(parts)
