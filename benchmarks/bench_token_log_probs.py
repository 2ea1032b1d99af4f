# SPDX-License-Identifier: Apache-2.0
"""token_log_probs beside log_softmax of all logits and beside the masked rows' logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.bench_linear_shifted_cross_entropy import Inputs, make
from benchmarks.harness import Bench
from diffullama_ext import token_log_probs


@torch.no_grad()
def ext(i: Inputs) -> Tensor:
    return token_log_probs(i.hidden, i.weight, i.x0, i.masked, impl="ext")


@torch.no_grad()
def full_logits(i: Inputs) -> Tensor:
    logp = torch.log_softmax(torch.nn.functional.linear(i.hidden[:, :-1], i.weight), dim=-1)
    picked = logp.gather(-1, i.x0[:, 1:, None]).squeeze(-1).masked_fill(~i.masked[:, 1:], 0.0)
    return torch.nn.functional.pad(picked, (1, 0))


@torch.no_grad()
def masked_rows(i: Inputs) -> Tensor:
    b, j = i.masked[:, 1:].nonzero(as_tuple=True)
    logits = torch.nn.functional.linear(i.hidden[b, j], i.weight)
    out = torch.zeros(i.x0.shape, dtype=logits.dtype, device=logits.device)
    out[b, j + 1] = -torch.nn.functional.cross_entropy(logits, i.x0[b, j + 1], reduction="none")
    return out


def agree(ours: Tensor, peer: Tensor) -> None:
    torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-4)


BENCH = Bench(
    "token_log_probs",
    shapes.LOSS_HALF,
    make,
    {"ext": ext, "full logits": full_logits, "masked rows": masked_rows},
    agree,
    against="full logits",
)


@BENCH.parametrize()
def bench_token_log_probs(compare: Callable[..., None], shape: str, contender: str) -> None:
    compare(BENCH, shape, contender)
