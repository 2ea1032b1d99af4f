# SPDX-License-Identifier: Apache-2.0
"""mask_tokens beside rand, where, nonzero and sum."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Bench
from diffullama_ext import MaskedTokens, mask_tokens

MASK_ID = 50256


class Inputs(NamedTuple):
    x0: Tensor
    p_mask: Tensor
    maskable: Tensor
    seed: Tensor


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    size = (shape["batch"], shape["length"])
    x0 = torch.randint(0, 50000, size, device=device)
    p_mask = 0.001 + 0.999 * torch.rand(size[0], device=device)
    return Inputs(x0, p_mask, torch.rand(size, device=device) < 0.9, torch.tensor([7], device=device))


def ext(i: Inputs) -> MaskedTokens:
    return mask_tokens(i.x0, i.p_mask, mask_id=MASK_ID, maskable=i.maskable, seed=i.seed, impl="ext")


def eager(i: Inputs) -> MaskedTokens:
    masked = (torch.rand(i.x0.shape, device=i.x0.device) < i.p_mask[:, None]) & i.maskable
    xt = torch.where(masked, MASK_ID, i.x0)
    return MaskedTokens(xt, masked, masked.flatten().nonzero().squeeze(1), masked.sum(dim=1))


def agree(ours: MaskedTokens, peer: MaskedTokens) -> None:
    """Other random numbers, the same law: as many masked within 5 sigma."""
    n = ours.masked.numel()
    assert abs(int(ours.counts.sum() - peer.counts.sum())) < 5 * (n / 2) ** 0.5


BENCH = Bench(
    "mask_tokens",
    shapes.TOKENS,
    make,
    {"ext": ext, "rand/where/nonzero": eager},
    agree,
    against="rand/where/nonzero",
    speedup={"64x2048": 2.0},
)


@BENCH.parametrize()
def bench_mask_tokens(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
