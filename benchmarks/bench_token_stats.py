# SPDX-License-Identifier: Apache-2.0
"""token_stats beside the usual sampler: softmax, sort, cumsum, scatter, Categorical, and the token's probability."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Bench
from diffullama_ext import token_stats


class Inputs(NamedTuple):
    logits: Tensor
    temperature: float
    top_p: float
    seed: Tensor


class Drawn(NamedTuple):
    token: Tensor
    prob: Tensor  # under softmax(logits)


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    logits = 2 * torch.randn(shape["rows"], shape["vocab"], device=device, dtype=shape["dtype"])
    return Inputs(logits, shape["temperature"], shape["top_p"], torch.tensor([7], device=device))


def ext(i: Inputs) -> Drawn:
    """Draws, and gives the margin, the entropy and the other statistics besides."""
    stats = token_stats(i.logits, temperature=i.temperature, top_p=i.top_p, seed=i.seed, impl="ext")
    return Drawn(stats.token, stats.prob)


def _truncated(i: Inputs) -> Tensor:
    """Logits / temperature with -inf outside the nucleus."""
    logits = i.logits / i.temperature if i.temperature != 1.0 else i.logits
    if i.top_p >= 1.0:
        return logits
    ranked, order = torch.sort(logits, dim=-1, descending=True)
    p = torch.softmax(ranked, dim=-1)
    removed = p.cumsum(dim=-1) - p >= i.top_p
    return logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)


def categorical(i: Inputs) -> Drawn:
    token = torch.distributions.Categorical(logits=_truncated(i), validate_args=False).sample()
    prob = torch.softmax(i.logits, dim=-1).gather(-1, token[:, None]).squeeze(-1)
    return Drawn(token, prob)


def gumbel(i: Inputs) -> Drawn:
    """argmax(logits - log(Exp)): the cheapest exact draw, without a cumulative sum."""
    noise = torch.empty_like(i.logits).exponential_().log_()
    token = (_truncated(i) - noise).argmax(dim=-1)
    picked = i.logits.gather(-1, token[:, None]).squeeze(-1)
    return Drawn(token, torch.exp(picked - torch.logsumexp(i.logits, dim=-1)))


def agree(ours: Drawn, peer: Drawn) -> None:
    """Other random numbers, the same law: the mean log-probability of the drawn tokens is alike."""
    ours_mean, peer_mean = ours.prob.log().mean(), peer.prob.log().mean()
    spread = torch.cat([ours.prob, peer.prob]).log().std() * (2 / ours.prob.numel()) ** 0.5
    assert (ours_mean - peer_mean).abs() < 5 * spread


BENCH = Bench(
    "token_stats",
    shapes.LOGITS,
    make,
    {"ext": ext, "sort/Categorical": categorical, "sort/Gumbel": gumbel},
    agree,
    against="sort/Categorical",
    speedup={"256x32000-top-p": 8.0},
)


@BENCH.parametrize()
def bench_token_stats(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
