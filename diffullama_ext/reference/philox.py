# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 in integer PyTorch: the random words of every op, as a pure function of (seed, index, tag, stream).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). ``csrc/common/philox.h`` is the same
function for C++ and CUDA; tests require equality word for word.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF

# Third counter word: keeps the streams of two ops with the same seed apart. Mirrored in csrc/common/philox.h.
TAG_NOISE = 1
TAG_ATTENTION_MASK = 2
TAG_TOKEN = 3
TAG_UNMASK = 4
TAG_TIME = 5
TAG_REPLACEMENT = 6
TAG_CHOICE = 7  # of policies; in Python only

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _mulhilo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * x`` for 32-bit values held in int64."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(c0: Tensor, c1: Tensor, c2: Tensor | int, c3: Tensor | int, seed: Tensor) -> Tensor:
    """Four 32-bit words per counter.

    Args:
        c0, c1, c2, c3: counter words in [0, 2**32), int64, broadcastable against each other.
        seed: int64 scalar or [1]; its 64 bits are the key.

    Returns:
        [..., 4] int64 with values in [0, 2**32).
    """
    seed = seed.reshape(())
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    c = list(
        torch.broadcast_tensors(c0, c1, torch.as_tensor(c2, device=c0.device), torch.as_tensor(c3, device=c0.device))
    )
    for round_index in range(10):
        if round_index:
            k0, k1 = (k0 + _W0) & MASK32, (k1 + _W1) & MASK32
        hi0, lo0 = _mulhilo(_M0, c[0])
        hi1, lo1 = _mulhilo(_M1, c[2])
        c = [hi1 ^ c[1] ^ k0, lo1, hi0 ^ c[3] ^ k1, lo0]
    return torch.stack(c, dim=-1)


def threshold32(p: Tensor) -> Tensor:
    """Integer threshold of a probability: ``word < threshold32(p)`` holds with probability p (exact to 2**-32).

    p = 1 gives 2**32, which every word is below; NaN and p < 0 give 0.
    """
    return (p.double().nan_to_num(nan=0.0).clamp(0.0, 1.0) * 2.0**32).to(torch.int64)
