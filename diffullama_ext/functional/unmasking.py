# SPDX-License-Identifier: Apache-2.0
"""Statistics of logits rows, and the choice of what to unmask."""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from .._library import use_kernel
from ..checks import FLOATS, as_scalar_tensor, check_choice, check_int, check_range, check_tensor
from .random import index_tensor, seed_tensor

RULES = ("quota", "threshold", "factor", "random")


class TokenStats(NamedTuple):
    """One row of logits each, [N]; see :func:`token_stats`."""

    token: Tensor  # int64, the drawn id; -1 for a row of NaN, +inf or nothing allowed (then all floats are NaN)
    prob: Tensor  # probability of token under softmax(logits)
    sample_prob: Tensor  # probability with which token was drawn (temperature, top-k, top-p applied)
    p1: Tensor  # largest probability
    p2: Tensor  # second largest probability
    gap: Tensor  # largest logit minus second largest
    entropy: Tensor  # in nats
    logsumexp: Tensor
    current_prob: Tensor  # probability of `current`; NaN where none was given


class Unmasked(NamedTuple):
    """What :func:`unmask` wrote."""

    xt: Tensor  # [B, L] int64
    committed: Tensor  # [B, L] bool, positions written now
    remaining: Tensor  # [B] int64, entries of `masked` that stay masked


@torch.no_grad()
def token_stats(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    forbid: int | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    row_index: Tensor | None = None,
    current: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> TokenStats:
    """Draw a token from every row of logits, and what decoding policies ask of the row, in one read of it.

    The draw: logits / temperature, then the top_k largest, then the shortest prefix of those whose renormalised
    probability reaches top_p (Hugging Face's order; equal logits: lowest id first), then one inverse-CDF draw keyed by
    (seed, step, row_index). Temperature 0 takes the largest logit, lowest id first. The statistics are those of
    softmax(logits) without the forbidden id, untempered and untruncated; only ``sample_prob`` is of the draw.

    Args:
        logits: [N, V] float.
        temperature: at least 0. top_k: at least 1, None means V. top_p: in (0, 1].
        forbid: the id that is never drawn and has no probability (the mask id), whatever its logit, NaN included; None
            means none.
        seed, step: 64 and 32 bits; ints or int64 [1] on the device. None draws the seed from ``generator``.
        row_index: [N] int64 key of each row's draw; None means 0..N-1. A row does not depend on the others.
        current: [N] int64 ids whose probability is returned too.

    Returns:
        TokenStats. A row with NaN or +inf, or with nothing allowed, has token -1 and NaN statistics.
    """
    check_tensor("logits", logits, FLOATS, ("N", "V"))
    n_rows, vocab = logits.shape
    if vocab == 0:
        raise ValueError("logits must have at least one column, got [N, 0]")
    check_range("temperature", temperature, 0.0, sys.float_info.max)
    check_range("top_p", top_p, 0.0, 1.0, low_open=True)
    if top_k is not None:
        check_int("top_k", top_k, 1, 2**31 - 1)
    if forbid is not None:
        check_int("forbid", forbid, 0, vocab - 1)
    if current is not None:
        check_tensor("current", current, torch.int64, (n_rows,), logits.device)
    backend = ops.unmasking if use_kernel("token_stats", logits.device, impl) else reference.unmasking
    return TokenStats(
        *backend.token_stats(
            logits,
            current,
            index_tensor("row_index", row_index, n_rows, logits.device),
            seed_tensor(seed, generator, logits.device),
            as_scalar_tensor("step", step, torch.int64, logits.device),
            float(temperature),
            top_k or 0,
            float(top_p),
            -1 if forbid is None else forbid,
        )
    )


@torch.no_grad()
def unmask(
    xt: Tensor,
    masked: Tensor,
    token: Tensor,
    confidence: Tensor,
    amount: Tensor,
    *,
    rule: str = "quota",
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    sample_index: Tensor | None = None,
    impl: str = "auto",
) -> Unmasked:
    """Choose which masked positions to commit and write their tokens. At least one a sequence with any eligible.

    Eligible are the True entries of ``masked`` (still masked, and inside the active block) whose token is at least 0
    and whose confidence is not NaN. Of these, ties to the lowest position:

    =========== ====================================================================================================
    rule        committed
    =========== ====================================================================================================
    "quota"     the ``amount[b]`` most confident
    "threshold" confidence >= amount[b], and the most confident one (Fast-dLLM)
    "factor"    the longest prefix by falling confidence c_1, c_2, ... with c_n >= 1 - amount[b] / (n + 1) (Fast-dLLM)
    "random"    each with probability amount[b], by the random word of (seed, step, sample_index, position); where none
                is chosen, the one with the smallest word (DiffuLLaMA, Algorithm 2)
    =========== ====================================================================================================

    Args:
        xt: [B, L] int64. masked: [B, L] bool. token: [B, L] int64. confidence: [B, L] float32.
        amount: [B] float32, by rule; a quota is rounded up.
        seed, step: ints or int64 [1] on the device. sample_index: [B] int64 (its low 32 bits act); None means 0..B-1.
    """
    check_tensor("xt", xt, torch.int64, ("B", "L"))
    batch, length = xt.shape
    check_tensor("masked", masked, torch.bool, (batch, length), xt.device)
    check_tensor("token", token, torch.int64, (batch, length), xt.device)
    check_tensor("confidence", confidence, torch.float32, (batch, length), xt.device)
    check_tensor("amount", amount, torch.float32, (batch,), xt.device)
    check_choice("rule", rule, RULES)
    backend = ops.unmasking if use_kernel("unmask", xt.device, impl) else reference.unmasking
    return Unmasked(
        *backend.unmask(
            xt,
            masked,
            token,
            confidence,
            amount,
            as_scalar_tensor("seed", seed, torch.int64, xt.device),
            as_scalar_tensor("step", step, torch.int64, xt.device),
            index_tensor("sample_index", sample_index, batch, xt.device),
            rule,
        )
    )
