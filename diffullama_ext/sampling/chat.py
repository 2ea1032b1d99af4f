# SPDX-License-Identifier: Apache-2.0
"""Conversations, in the form that the tokenizer's chat template gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .generate import generate

Message = Mapping[str, str]  # {"role": ..., "content": ...}


class ChatOutput(NamedTuple):
    """What :func:`chat` returns, one entry a conversation."""

    texts: list[str]  # the replies, without special tokens
    nfe: Tensor  # [B] int64
    completion_tokens: Tensor  # [B] int64, with the end token


def chat(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    *,
    length: int,
    eos_id: int | None = None,
    **options: Any,
) -> ChatOutput:
    """Reply to one conversation or several, of any lengths, in one batch.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: ``[{"role": "user", "content": "..."}]``, or a sequence of those.
        length: tokens to generate, the most of a reply.
        eos_id: ends a reply; None takes the tokenizer's.
        options: of :func:`generate` (steps, policy, cache, ...).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`generate`; a tokenizer without a chat template; no messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"tokenizer must have a chat template, {type(tokenizer).__name__} has none")
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    if not conversations or not all(conversations):
        raise ValueError("messages must be a conversation of at least one message, or several of those")
    rows = [
        tokenizer.apply_chat_template(list(one), add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        for one in conversations
    ]
    width = max(map(len, rows))
    eos_id = tokenizer.eos_token_id if eos_id is None else eos_id
    out = generate(
        model,
        length=length,
        prompt_ids=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        eos_id=eos_id,
        **options,
    )
    replies = [
        ids[:count]
        for ids, count in zip(out.sequences[:, -length:].tolist(), out.completion_tokens.tolist(), strict=True)
    ]
    return ChatOutput(tokenizer.batch_decode(replies, skip_special_tokens=True), out.nfe, out.completion_tokens)
