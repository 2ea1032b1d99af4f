# SPDX-License-Identifier: Apache-2.0
"""A sampling step without its forward, beside the released loops in eager PyTorch: LLaDA's, and DiffuLLaMA's.

Both of those work on the logits of every position; ours on those of the masked ones, which are all that a model's head
computes for it. "function" is ours where all logits are there already.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Bench
from diffullama_ext.sampling import make_policy
from diffullama_ext.sampling.denoisers import FunctionDenoiser
from diffullama_ext.sampling.state import Scored, State
from diffullama_ext.sampling.statistics import PositionStats


class Inputs(NamedTuple):
    logits: Tensor  # [B, L, V]; row i scores position i
    scored: Scored  # of the masked positions
    xt: Tensor
    masked: Tensor
    mask_id: int
    steps: int  # left
    shape: Mapping[str, Any]


def make(shape: Mapping[str, Any], device: str) -> Inputs:
    batch, length, vocab = shape["batch"], shape["length"], shape["vocab"]
    logits = 3.0 * torch.randn(batch, length, vocab, device=device)
    logits[..., vocab - 1] = -1e4  # the mask; the released loops do not exclude it
    masked = torch.arange(length, device=device).expand(batch, -1) >= length // 2
    xt = torch.randint(0, vocab - 1, (batch, length), device=device).masked_fill(masked, vocab - 1)
    at = masked.flatten().nonzero().squeeze(1)
    scored = Scored(logits.flatten(0, 1)[at], at)
    return Inputs(logits, scored, xt, masked, vocab - 1, shape["steps"], shape)


class _Rows:
    def __init__(self, scored: Scored) -> None:
        self.scored = scored

    def score(self, state: State, rows: Tensor) -> Scored:
        return self.scored


def _step(i: Inputs, denoise: Any) -> tuple[Tensor, Tensor]:
    policy, score = make_policy(i.shape["policy"]), PositionStats(i.shape["temperature"], None, i.shape["top_p"])
    state = State.start(i.xt, i.masked, mask_id=i.mask_id, steps=i.steps, block_length=None, seed=1, sample_index=None)
    state.begin(0)
    rows = policy.rows(state)
    stats = score(denoise.score(state, rows), rows, state)
    state.apply(stats.token, policy.decide(stats, state))
    return state.xt, state.masked


@torch.no_grad()
def ext(i: Inputs) -> tuple[Tensor, Tensor]:
    return _step(i, _Rows(i.scored))


@torch.no_grad()
def function(i: Inputs) -> tuple[Tensor, Tensor]:
    return _step(i, FunctionDenoiser(lambda xt: i.logits, shift=False))


def _llada(i: Inputs) -> tuple[Tensor, Tensor]:
    """Low-confidence remasking at temperature 0: float64 softmax over all, topk sequence by sequence."""
    x0 = i.logits.argmax(dim=-1)
    p = torch.softmax(i.logits.to(torch.float64), dim=-1)
    confidence = p.gather(-1, x0[..., None]).squeeze(-1)
    confidence = torch.where(i.masked, confidence, -torch.inf)
    quota = -(-i.masked.sum(dim=1) // i.steps)
    commit = torch.zeros_like(i.masked)
    for row in range(len(i.xt)):
        commit[row, confidence[row].topk(int(quota[row])).indices] = True
    return torch.where(commit, x0, i.xt), i.masked & ~commit


def _diffullama(i: Inputs) -> tuple[Tensor, Tensor]:
    """Temperature, top-p by a sort of the vocabulary, a draw at all positions; each revealed by chance."""
    logits = i.logits / i.shape["temperature"]
    ordered, index = logits.sort(dim=-1, descending=True)
    cut = ordered.softmax(dim=-1).cumsum(dim=-1) > i.shape["top_p"]
    cut[..., 1:] = cut[..., :-1].clone()
    cut[..., 0] = False
    logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, index, cut), -torch.inf)
    x0 = torch.distributions.Categorical(logits=logits).sample()
    commit = i.masked & (torch.rand(i.xt.shape, device=i.xt.device) < 1 / i.steps)
    return torch.where(commit, x0, i.xt), i.masked & ~commit


@torch.no_grad()
def eager(i: Inputs) -> tuple[Tensor, Tensor]:
    return _llada(i) if i.shape["temperature"] == 0 else _diffullama(i)


def agree(ours: tuple[Tensor, Tensor], peer: tuple[Tensor, Tensor]) -> None:
    """Greedy steps are equal; of random ones, the number of commits is within 5 standard deviations."""
    if torch.equal(ours[0], peer[0]):
        assert torch.equal(ours[1], peer[1])
    else:
        assert abs(int(ours[1].sum()) - int(peer[1].sum())) <= 5 * ours[1].numel() ** 0.5


BENCH = Bench(
    "sampling_step",
    shapes.SAMPLING_STEP,
    make,
    {"ext": ext, "function": function, "eager": eager},
    agree,
    against="eager",
    speedup=dict.fromkeys(shapes.SAMPLING_STEP, 8.0),
)


@BENCH.parametrize()
def bench_sampling_step(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
