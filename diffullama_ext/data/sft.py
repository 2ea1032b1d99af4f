# SPDX-License-Identifier: Apache-2.0
"""Prompts and responses as examples: the prompt is never noised and never scored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_choice
from .blocks import mixed, train_and_heldout
from .packing import check_length
from .source import DataSource, check_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDINGS = ("eos", "exclude")


@dataclass(frozen=True)
class SftColumns:
    """Where a row has its texts: ``messages``, a chat, or else ``prompt`` and ``response``."""

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"


class SftExamples(Dataset[dict[str, Tensor]]):
    """Examples of ``input_ids`` int64 [n] and ``maskable`` bool [n], n <= length (== length with padding "eos").

    Attributes:
        n_truncated: responses cut at ``length``, without their end-of-text token.
        n_dropped: rows whose prompt leaves no room for a response.
    """

    def __init__(self, pairs: Sequence[tuple[list[int], list[int]]], length: int, padding: str, eos_id: int) -> None:
        self.length, self.padding, self.eos_id = length, padding, eos_id
        self.pairs = [(prompt, response[: length - len(prompt)]) for prompt, response in pairs if len(prompt) < length]
        self.n_dropped = len(pairs) - len(self.pairs)
        self.n_truncated = sum(len(prompt) + len(response) > length for prompt, response in pairs) - self.n_dropped

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, response = self.pairs[index]
        ids = prompt + response
        if self.padding == "eos":
            ids = ids + [self.eos_id] * (self.length - len(ids))
        maskable = torch.ones(len(ids), dtype=torch.bool)
        maskable[: len(prompt)] = False
        return {"input_ids": torch.tensor(ids), "maskable": maskable}


def load_sft(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    padding: str = "eos",
    columns: SftColumns | None = None,
) -> Dataset[dict[str, Tensor]]:
    """Supervised examples of all sources, mixed by weight, held in memory.

    A pair becomes [bos] prompt response [eos], the bos where the tokenizer has one (an end-of-text token where it has
    none and the prompt is empty: with the shift something must stand before the response). Of a chat, the tokenizer's
    template makes the prompt from all messages but the last, which must be the assistant's and is the response.

    Args:
        sources: JSON, Parquet, saved datasets or datasets of the Hub.
        tokenizer: with an ``eos_token_id``, and a chat template for chats.
        length: most tokens of an example. A longer response is cut; a row whose prompt alone is as long is dropped;
            both are counted in one warning.
        padding: "eos" fills each example with end-of-text tokens that are attended to, noised and scored, as LLaDA and
            DiffuLLaMA do: the model learns to end early inside a fixed length. The fill is to ``length``, not to the
            longest of the batch, so no example's loss depends on its batch. "exclude" leaves padding to the collator:
            neither attended to nor scored; only the one end-of-text token is learned.
        columns: names of the texts' columns.

    Raises:
        FileNotFoundError, OSError, ValueError: unreadable files; a row without those columns, or whose texts are not
            texts; a chat that does not end with the assistant, or a template under which the prompt is no beginning of
            the chat; no example left.
    """
    return mixed(_sft_parts(sources, tokenizer, length, padding, columns), sources)


def load_sft_train_and_heldout(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    heldout: float,
    padding: str = "eos",
    columns: SftColumns | None = None,
) -> tuple[Dataset[dict[str, Tensor]], Dataset[dict[str, Tensor]]]:
    """(training examples, held-out ones): the last ``heldout`` share of each source's, at least one on either side.

    The rest as :func:`load_sft`; ValueError also for a share outside (0, 1) or a source of a single example.
    """
    parts = _sft_parts(sources, tokenizer, length, padding, columns)
    return train_and_heldout(parts, sources, heldout, example="example")


def _sft_parts(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    padding: str,
    columns: SftColumns | None,
) -> list[SftExamples]:
    check_length(length)
    check_choice("padding", padding, PADDINGS)
    check_sources(sources)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token, which ends a response; set one")
    columns = columns or SftColumns()
    parts = []
    for source in sources:
        pairs = [_pair(row, tokenizer, columns, source.path) for row in source.rows()]
        part = SftExamples(pairs, length, padding, tokenizer.eos_token_id)
        if not len(part):
            raise ValueError(
                f"{source.path} has no example that fits: {len(pairs)} rows, {part.n_dropped} of them with a prompt of "
                f"{length} tokens or more"
            )
        if part.n_dropped or part.n_truncated:
            warnings.warn(
                f"{source.path}: of {len(pairs)} rows {part.n_dropped} dropped (prompt of {length} tokens or more), "
                f"{part.n_truncated} responses cut",
                stacklevel=3,
            )
        parts.append(part)
    return parts


def _pair(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, columns: SftColumns, path: str
) -> tuple[list[int], list[int]]:
    """Ids of (prompt, response)."""
    if row.get(columns.messages) is not None:
        prompt, response = _chat_texts(row[columns.messages], tokenizer, path)
        head: list[int] = []  # the template writes what it needs
    else:
        missing = [name for name in (columns.prompt, columns.response) if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(
                f"a row of {path} needs {columns.messages!r}, or texts {columns.prompt!r} and {columns.response!r}; "
                f"it holds {', '.join(f'{name} ({type(value).__name__})' for name, value in row.items())}"
            )
        prompt, response = row[columns.prompt], row[columns.response]
        head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    head = head + ids(prompt)
    tail = ids(response)
    if not tail or tail[-1] != tokenizer.eos_token_id:
        tail = [*tail, tokenizer.eos_token_id]
    return head or [tokenizer.eos_token_id], tail


def _chat_texts(messages: Any, tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[str, str]:
    """(prompt, response) by the tokenizer's template, tokenised apart as in generation."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if not roles or roles[-1] != "assistant":
        raise ValueError(f"a chat of {path} must end with a message of 'assistant', got the roles {roles}")
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer has no chat_template, which the chats of {path} need")
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not whole.startswith(prompt):
        raise ValueError(
            f"the chat template does not start a chat of {path} with its prompt: {prompt[-40:]!r} is not where the "
            "assistant's message begins"
        )
    return prompt, whole[len(prompt) :]
