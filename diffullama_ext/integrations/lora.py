# SPDX-License-Identifier: Apache-2.0
"""LoRA for adapted models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checks import check_int
from .transformers import DiffusionConfig


def add_lora(model: PreTrainedModel, *, rank: int, alpha: int | None = None, dropout: float = 0.0) -> Any:
    """A peft model that trains low-rank updates of every linear layer and the embedding of the mask token alone.

    The mask token meets the model for the first time, so its embedding must move; the other rows stay as they are, also
    where the head is tied to the embedding.

    Args:
        model: adapted.
        rank: of the updates. alpha: their scale, by default twice the rank. dropout: on their inputs.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022).
    """
    from peft import LoraConfig, get_peft_model

    check_int("rank", rank, 1, 2**31 - 1)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        trainable_token_indices=[DiffusionConfig.of(model).mask_id],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 keeps W^T
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
