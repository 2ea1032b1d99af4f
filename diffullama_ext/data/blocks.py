# SPDX-License-Identifier: Apache-2.0
"""Blocks of one length over stored tokens, alone and in mixtures."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..checks import check_choice, check_range
from .packing import check_length
from .source import DataSource, check_sources
from .token_store import TokenStore, cached_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXTS = ("overlap", "none")
CACHE_DIR = "~/.cache/diffullama_ext"  # DIFFULLAMA_CACHE overrides it


class BlockLayout:
    """How a row of tokens is cut into examples of ``length`` tokens; the incomplete last one is dropped.

    With the shift no logits row predicts position 0 of a block. ``context`` says what becomes of it:

    - "overlap": a block starts with the last token of the one before, marked not maskable: it is context, and every
      token of the data but the first is a target exactly once. Right with the shift.
    - "none": blocks do not overlap. With the shift, 1/length of the tokens are noised and never scored (the released
      DiffuLLaMA code); without it nothing is lost.

    ``isolate_documents`` adds ``document_ids`` (0, 1, ... in each block); with "overlap" the first token of a document
    is not maskable either, since no row of its own document predicts it: a bos token there makes that no loss.
    """

    def __init__(self, length: int, context: str = "overlap", isolate_documents: bool = False) -> None:
        check_length(length)
        check_choice("context", context, CONTEXTS)
        self.length = length
        self.context = context
        self.isolate_documents = isolate_documents
        self.stride = length - 1 if context == "overlap" else length

    def count(self, n_tokens: int) -> int:
        """Blocks that n_tokens make."""
        return max(0, (n_tokens - (self.length - self.stride)) // self.stride)

    def example(self, tokens: Tensor, starts: Tensor) -> dict[str, Tensor]:
        """The example of one block: tokens [length] int64, starts [length] bool, True at first tokens of documents."""
        example = {"input_ids": tokens}
        if self.context == "overlap":
            maskable = ~starts if self.isolate_documents else torch.ones_like(starts)
            maskable[0] = False
            example["maskable"] = maskable
        if self.isolate_documents:
            example["document_ids"] = starts.long().cumsum(dim=0) - starts[0].long()
        return example


class StoredBlocks(Dataset[dict[str, Tensor]]):
    """Blocks over a :class:`TokenStore`, read from disk as they are asked for.

    An example holds ``input_ids`` int64 [length], and by the layout ``maskable`` bool [length] and ``document_ids``
    int64 [length].

    Raises:
        ValueError: fewer tokens than one block needs.
    """

    def __init__(self, store: TokenStore, layout: BlockLayout, name: str = "the data") -> None:
        self.store = store
        self.layout = layout
        self.size = layout.count(len(store.tokens))
        if self.size == 0:
            raise ValueError(
                f"{name} is too short: {len(store.ends)} documents make {len(store.tokens)} tokens, one block needs "
                f"{layout.length}"
            )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(f"block {index} of {self.size}")
        start = index * self.layout.stride
        stop = start + self.layout.length
        tokens = torch.from_numpy(self.store.tokens[start:stop].astype(np.int64))
        first, last = np.searchsorted(self.store.ends, [start, stop])
        begins = self.store.ends[first:last] - start  # in the block; 0 where its first token begins a document
        starts = torch.zeros(self.layout.length, dtype=torch.bool)
        starts[torch.from_numpy(begins[begins < self.layout.length])] = True
        starts[0] |= start == 0
        return self.layout.example(tokens, starts)


class MixedBlocks(Dataset[dict[str, Tensor]]):
    """Datasets in proportion to weights: of N examples, dataset d gives round(N w_d / sum w), each of its own in turn.

    N is the least number at which every example of every dataset occurs; a dataset whose share exceeds its size is
    repeated. The order is by dataset: a sampler shuffles.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        if not datasets or len(datasets) != len(weights):
            raise ValueError(f"datasets and weights must be as many, at least one, got {len(datasets)}, {len(weights)}")
        if not all(weight > 0 for weight in weights):
            raise ValueError(f"weights must be above 0, got {list(weights)}")
        self.datasets = list(datasets)
        self.sizes = [len(dataset) for dataset in datasets]  # type: ignore[arg-type]
        scale = max(size / weight for size, weight in zip(self.sizes, weights, strict=True))
        self.counts = [max(size, round(scale * weight)) for size, weight in zip(self.sizes, weights, strict=True)]
        self.ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = bisect_right(self.ends, index)
        within = index - (self.ends[part - 1] if part else 0)
        return self.datasets[part][within % self.sizes[part]]


def load_blocks(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    cache_dir: str | Path | None = None,
    context: str = "overlap",
    bos: bool = False,
    isolate_documents: bool = False,
) -> Dataset[dict[str, Tensor]]:
    """Map-style training blocks of all sources, tokenised once into a cache and mapped from there.

    Documents are joined with the end-of-text token and cut without regard to their borders, as in the pretraining of
    the adapted models; blocks never mix sources.

    Args:
        sources: at least one; several are mixed by their weights (see :class:`MixedBlocks`).
        tokenizer: with an ``eos_token_id``.
        length: tokens of a block, at least 2.
        cache_dir: None is $DIFFULLAMA_CACHE, or ~/.cache/diffullama_ext. The key is the content of data and tokenizer.
        context, isolate_documents: see :class:`BlockLayout`.
        bos: each document is opened by the tokenizer's bos token.

    Raises:
        FileNotFoundError, OSError, ValueError: of :func:`read_texts`; a source too short for a block; a damaged cache.
    """
    parts = _stored_parts(sources, tokenizer, BlockLayout(length, context, isolate_documents), cache_dir, bos)
    return mixed(parts, sources)


def load_train_and_heldout(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    heldout: float,
    cache_dir: str | Path | None = None,
    context: str = "overlap",
    bos: bool = False,
    isolate_documents: bool = False,
) -> tuple[Dataset[dict[str, Tensor]], Dataset[dict[str, Tensor]]]:
    """(training blocks, held-out blocks): the last ``heldout`` share of each source's, at least one on either side.

    Both are mixed by the sources' weights. The rest as :func:`load_blocks`; ValueError also for a share outside (0, 1)
    or a source of a single block.
    """
    parts = _stored_parts(sources, tokenizer, BlockLayout(length, context, isolate_documents), cache_dir, bos)
    return train_and_heldout(parts, sources, heldout, example=f"block of {length} tokens")


def _stored_parts(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    layout: BlockLayout,
    cache_dir: str | Path | None,
    bos: bool,
) -> list[StoredBlocks]:
    check_sources(sources)
    where = cache_dir or os.environ.get("DIFFULLAMA_CACHE") or CACHE_DIR
    stores = [cached_store(source, tokenizer, where, bos=bos) for source in sources]
    return [StoredBlocks(store, layout, source.path) for store, source in zip(stores, sources, strict=True)]


def mixed(parts: Sequence[Dataset[dict[str, Tensor]]], sources: Sequence[DataSource]) -> Dataset[dict[str, Tensor]]:
    """The parts by their sources' weights; one alone is itself."""
    return parts[0] if len(parts) == 1 else MixedBlocks(parts, [source.weight for source in sources])


def train_and_heldout(
    parts: Sequence[Dataset[dict[str, Tensor]]], sources: Sequence[DataSource], share: float, *, example: str
) -> tuple[Dataset[dict[str, Tensor]], Dataset[dict[str, Tensor]]]:
    """(training examples, held-out ones): the last ``share`` of each part, at least one on either side, then mixed.

    ValueError for a share outside (0, 1) or a part of a single ``example``, as the message calls it.
    """
    check_range("heldout", share, 0.0, 1.0, low_open=True, high_open=True)
    train, held = [], []
    for part, source in zip(parts, sources, strict=True):
        size = len(part)  # type: ignore[arg-type]
        if size < 2:
            raise ValueError(f"{source.path} is too short: 1 {example} cannot be split")
        cut = size - min(max(1, round(share * size)), size - 1)
        train.append(Subset(part, range(cut)))
        held.append(Subset(part, range(cut, size)))
    return mixed(train, sources), mixed(held, sources)
