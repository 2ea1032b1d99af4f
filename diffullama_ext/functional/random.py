# SPDX-License-Identifier: Apache-2.0
"""Seeds and indices that the public functions take as ints or tensors."""

import torch
from torch import Tensor

from ..checks import as_scalar_tensor, check_tensor


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
