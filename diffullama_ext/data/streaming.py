# SPDX-License-Identifier: Apache-2.0
"""Blocks made while they are read: for data that is too large to tokenise first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .blocks import BlockLayout
from .packing import tokenized
from .source import DataSource, check_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EPOCH_BITS = 40  # sample_index = epoch * 2^40 + place in the epoch


class StreamedBlocks(IterableDataset[dict[str, Any]]):
    """The blocks of :func:`stream_blocks`. Each worker of a data loader reads everything and gives its share."""

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer: PreTrainedTokenizerBase,
        layout: BlockLayout,
        bos: bool,
        seed: int,
    ) -> None:
        self.sources = list(sources)
        self.tokenizer = tokenizer
        self.layout = layout
        self.bos = bos
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has other numbers, so other noise, and another order of the sources."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        share, n_shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place, example in enumerate(self._mixed()):
            if place % n_shares == share:
                yield {**example, "sample_index": (self.epoch << EPOCH_BITS) + place}

    def _mixed(self) -> Iterator[dict[str, Tensor]]:
        """Block by block from a source drawn by weight, until the drawn one has no more."""
        parts = [self._blocks(source) for source in self.sources]
        shares = np.cumsum([source.weight for source in self.sources])
        draws = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
        found = False
        while True:
            part = int(np.searchsorted(shares, draws.random() * shares[-1], side="right"))
            example = next(parts[part], None)
            if example is None:
                if not found:
                    raise ValueError(
                        f"{self.sources[part].path} is too short: one block needs {self.layout.length} tokens"
                    )
                return
            found = True
            yield example

    def _blocks(self, source: DataSource) -> Iterator[dict[str, Tensor]]:
        layout, starts_document = self.layout, True
        kept = torch.empty((2, 0), dtype=torch.int64)  # ids, whether a document starts
        for ids, ends in tokenized(source.texts(streaming=True), self.tokenizer, bos=self.bos):
            if not ids:
                continue
            starts = torch.zeros(len(ids), dtype=torch.int64)
            starts[0] = starts_document
            row = torch.cat([kept, torch.stack([torch.tensor(ids), starts])], dim=1)
            n_blocks = layout.count(row.shape[1])
            for start in range(0, n_blocks * layout.stride, layout.stride):
                block = row[:, start : start + layout.length]
                yield layout.example(block[0].clone(), block[1].bool())
            kept = row[:, n_blocks * layout.stride :]
            starts_document = ends


def stream_blocks(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    seed: int = 0,
    context: str = "overlap",
    bos: bool = False,
    isolate_documents: bool = False,
) -> StreamedBlocks:
    """Training blocks as an iterable dataset: the examples of :func:`load_blocks` plus ``sample_index``.

    Nothing is cached and the order of each source is kept. Several sources are mixed by drawing one a block, by weight,
    as a function of (seed, epoch); the stream ends with the first source that is exhausted. A resumed run reads the
    stream again up to its place.

    Raises:
        As :func:`load_blocks`, while iterating; a missing path or source at once.
    """
    check_sources(sources)
    for source in sources:
        source.texts(streaming=True)  # a missing path shows here
    return StreamedBlocks(sources, tokenizer, BlockLayout(length, context, isolate_documents), bos, seed)
