# SPDX-License-Identifier: Apache-2.0
"""The left-to-right loss that the model started from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..objective.model_forward import check_attention
from ..objective.noising import targets
from ..objective.streams import Streams, one_stream
from .diffusion import Heldout, Progress, evaluating, masked_scores
from .estimate import Estimate, concatenated


def autoregressive_loss(
    model: Any,
    blocks: Tensor,
    *,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Estimate:
    """Next-token loss per token, in nats, with causal attention.

    Args:
        model: a causal language model of transformers. An adapted one is run with a causal mask: what of its old skill
            is left.
        blocks: [N, L] int32 or int64 held-out tokens; token 0 of a block is not predicted.
        maskable, attention_mask: [N, L]; prompts and padding (on the right) are not predicted.
        document_ids: [N, L], of an adapted model; a document's first token is not predicted.
        batch_size: blocks a forward; it changes no figure beyond rounding.
        progress: called with (batches done, batches in all).
    """
    heldout = Heldout(blocks, maskable, attention_mask, document_ids).checked()
    adapted = not getattr(model.config, "is_causal", True)
    if document_ids is not None and not adapted:
        raise ValueError("document_ids must be None with a model that is not adapted, whose attention is its own")
    if adapted:
        check_attention(model)
    batches = heldout.split(batch_size, next(model.parameters()).device)
    parts = []
    with evaluating(model):
        for done, batch in enumerate(batches, start=1):
            x0 = batch.blocks
            able, predicted = targets(*batch, shift=True)
            if adapted:
                streams = one_stream(x0, batch.attending(0.0))
            else:
                streams = Streams({"input_ids": x0, "attention_mask": batch.attention_mask}, None)
            scored = able & predicted
            nll, _ = masked_scores(model, x0, scored, streams, shift=True)
            parts.append((nll, scored.sum(dim=1)))
            if progress is not None:
                progress(done, len(batches))
    return concatenated(parts)
