# SPDX-License-Identifier: Apache-2.0
"""Making one annealed attention mask: words beside a dense boolean of 8 times the size."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Bench
from diffullama_ext import AttentionMask


class Inputs(NamedTuple):
    length: int
    ratio: Tensor
    seed: Tensor
    causal: Tensor  # made once and kept, as a training loop would


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    length = shape["length"]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return Inputs(length, torch.tensor([0.3], device=device), torch.tensor([7], device=device), causal)


def ext(i: Inputs) -> Tensor:
    return AttentionMask.annealed(i.length, i.ratio, seed=i.seed).words


def eager(i: Inputs) -> Tensor:
    return i.causal | (torch.rand(i.length, i.length, device=i.causal.device) < i.ratio)


def agree(ours: Tensor, peer: Tensor) -> None:
    """As many open entries within 5 sigma; the words unpacked here, bit by bit."""
    if ours.dtype == peer.dtype:
        return
    bits = torch.arange(32, device=ours.device)
    opened = int(((ours[..., None] >> bits) & 1).sum())
    assert abs(opened - int(peer.sum())) < 5 * (peer.numel() / 4) ** 0.5


BENCH = Bench("annealed mask", shapes.MASKS, make, {"ext": ext, "rand | tril": eager}, agree, against="rand | tril")


@BENCH.parametrize()
def bench_attention_mask(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
