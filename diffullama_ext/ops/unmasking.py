# SPDX-License-Identifier: Apache-2.0
"""torch.ops.diffullama.{token_stats, unmask}."""

import torch
from torch import Tensor


@torch.library.register_fake("diffullama::token_stats")
def _(
    logits: Tensor,
    current: Tensor | None,
    row_index: Tensor,
    seed: Tensor,
    step: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    forbid: int,
) -> tuple[Tensor, Tensor]:
    n_rows = logits.shape[0]
    return row_index.new_empty((n_rows,)), logits.new_empty((8, n_rows), dtype=torch.float32)


def token_stats(
    logits: Tensor,
    current: Tensor | None,
    row_index: Tensor,
    seed: Tensor,
    step: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    forbid: int,
) -> tuple[Tensor, ...]:
    """(token, prob, sample_prob, p1, p2, gap, entropy, logsumexp, current_prob), each [N]."""
    token, values = torch.ops.diffullama.token_stats.default(
        logits, current, row_index, seed, step, temperature, top_k, top_p, forbid
    )
    return (token, *values.unbind(0))


@torch.library.register_fake("diffullama::unmask")
def _(
    xt: Tensor,
    masked: Tensor,
    token: Tensor,
    confidence: Tensor,
    amount: Tensor,
    seed: Tensor,
    step: Tensor,
    sample_index: Tensor,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return xt.new_empty(xt.shape), masked.new_empty(masked.shape), xt.new_empty((xt.shape[0],))


def unmask(
    xt: Tensor,
    masked: Tensor,
    token: Tensor,
    confidence: Tensor,
    amount: Tensor,
    seed: Tensor,
    step: Tensor,
    sample_index: Tensor,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(xt, committed, remaining); arguments as in the schema."""
    return torch.ops.diffullama.unmask.default(xt, masked, token, confidence, amount, seed, step, sample_index, rule)
