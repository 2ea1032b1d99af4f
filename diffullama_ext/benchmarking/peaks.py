# SPDX-License-Identifier: Apache-2.0
"""What this machine reaches: the rates that every share is a share of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import time_calls


@dataclass(frozen=True)
class Peaks:
    """Measured rates."""

    copy_bandwidth: float  # bytes a second, read plus written
    gemm_rate: float  # FLOP a second of a square matrix product: bfloat16 on CUDA, float32 on the CPU

    def floor_s(self, n_bytes: int, flops: int) -> float:
        """The least time for this traffic and these products."""
        return max(n_bytes / self.copy_bandwidth, flops / self.gemm_rate)

    def bound(self, n_bytes: int, flops: int) -> str:
        """Which of the two it is: "copy" or "gemm"."""
        return "gemm" if flops / self.gemm_rate > n_bytes / self.copy_bandwidth else "copy"


def measure_peaks(device: torch.device) -> Peaks:
    """A large copy, and a large matrix product of random values (zeros are faster)."""
    on_cuda = device.type == "cuda"
    n_bytes, n = (2**30, 8192) if on_cuda else (2**26, 512)
    dtype = torch.bfloat16 if on_cuda else torch.float32
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda pair: pair[1].copy_(pair[0]), [(source, target)], device)
    del source, target
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    product = time_calls(lambda three: torch.mm(three[0], three[1], out=three[2]), [(a, b, out)], device)
    return Peaks(2 * n_bytes / copy.median_s, 2 * n**3 / product.median_s)
