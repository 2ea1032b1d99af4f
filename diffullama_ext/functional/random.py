# SPDX-License-Identifier: Apache-2.0
"""Seeds and indices that the public functions take as ints or tensors."""

import torch
from torch import Tensor

from ..checks import as_scalar_tensor, check_tensor
from ..reference.philox import MASK32, TAG_CHOICE, philox


def seed_tensor(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The seed as int64 [1]; drawn from ``generator`` (torch's default one if None) where no seed is given."""
    if seed is None:
        where = device if generator is None else generator.device
        return torch.randint(2**63 - 1, (1,), generator=generator, device=where).to(device)
    return as_scalar_tensor("seed", seed, torch.int64, device)


def index_tensor(name: str, value: Tensor | None, size: int, device: torch.device) -> Tensor:
    """``value`` checked, or 0..size-1."""
    if value is None:
        return torch.arange(size, device=device)
    check_tensor(name, value, torch.int64, (size,), device)
    return value


def position_words(length: int, *, seed: Tensor, step: int, sample_index: Tensor) -> Tensor:
    """A random word in [0, 2**32) for every position of every sample, int64 [B, length].

    A function of (seed, step, sample_index, position), as the words of ``unmask`` are, and independent of those.
    """
    group = torch.arange((length + 3) // 4, device=sample_index.device)[None, :]
    sample = sample_index[:, None] & MASK32
    return philox(group, sample, TAG_CHOICE, step & MASK32, seed).flatten(1)[:, :length]
