# SPDX-License-Identifier: Apache-2.0
"""Every sample of a training run has a number, and the noise is a function of it.

The number is the sample's place in the stream of the whole run, epochs included: the same sample at the same place has
the same number for any micro-batch size, accumulation, number of processes, and after a resume.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info


class _Sized(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class NumberedSampler(Sampler[tuple[int, int]]):
    """Yields (number, index): number = epoch * size + place, index by a permutation of (seed, epoch), or in order.

    The order depends on nothing else, so a resumed run continues it.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, by the data loader of accelerate among others."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        for place, index in enumerate(order):
            yield self.epoch * self.size + place, index


class EndlessStream(IterableDataset[Mapping[str, Any]]):
    """An iterable dataset again and again; the dataset is told each epoch before it, in the process that reads.

    Trainer takes all steps of a dataset without a length for one epoch. So batches and steps may span two passes, and
    a place in the run is one in this stream, which a resumed run reads up to. A pass that gives nothing is an error; in
    a worker, whose share is empty then, the end.
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for epoch in itertools.count():
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            samples = iter(self.dataset)
            first = next(samples, None)
            if first is None and get_worker_info() is None:
                raise ValueError(f"an iterable train_dataset must give samples, got none in pass {epoch}")
            if first is None:
                return
            yield first
            yield from samples


class NumberedDataset(Dataset[dict[str, Any]]):
    """A map-style dataset of mappings, indexed by the pairs of :class:`NumberedSampler`; adds ``sample_index``."""

    def __init__(self, dataset: _Sized) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, numbered: tuple[int, int]) -> dict[str, Any]:
        number, index = numbered
        return {**self.dataset[index], "sample_index": number}
