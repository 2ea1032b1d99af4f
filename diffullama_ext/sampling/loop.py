# SPDX-License-Identifier: Apache-2.0
"""The reverse process: forward, statistics of the masked positions, a decision, a write, and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATS, check_tensor
from ..functional import TokenStats
from .policies import Policy, as_policy
from .state import Decision, State
from .statistics import PositionStats

Denoiser = Callable[[Tensor], Tensor]  # ids int64 [B, L] -> logits [B, L, V]
StepHook = Callable[[State, TokenStats, Decision], None]


class Filled(NamedTuple):
    """What :func:`fill` returns."""

    xt: Tensor  # [B, L] int64, no mask left
    nfe: Tensor  # [B] int64, forwards while the row had a mask


def _raise_failed(failed: Tensor, undrawn: Tensor, state: State, policy: Policy) -> None:
    """One RuntimeError that names the rows; failed [B], undrawn [B, L]: positions asked for that got no token."""
    without_token = (failed & undrawn.any(dim=1)).nonzero().flatten().tolist()
    if without_token:
        raise RuntimeError(
            f"no token can be drawn in rows {without_token}: the logits of masked positions are NaN, +inf, or -inf for "
            "every token but the mask"
        )
    raise RuntimeError(
        f"rows {failed.nonzero().flatten().tolist()} still have masks after step {state.step + 1}: {policy!r} must "
        "commit at least one position of a row in each step, and all of them by the last"
    )


@torch.no_grad()
def fill(
    denoise: Denoiser,
    xt: Tensor,
    masked: Tensor,
    *,
    mask_id: int,
    policy: str | Policy = "confidence",
    steps: int | None = None,
    block_length: int | None = None,
    shift: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | Tensor | None = 0,
    sample_index: Tensor | None = None,
    on_step: StepHook | None = None,
) -> Filled:
    """Fill the masked positions of a batch; everything else is context, on either side, and never changes.

    Every row begins at column 0; padding comes after it and is fixed (the denoiser knows about it). A row's text is a
    function of the seed, its sample index, its own tokens and the denoiser's logits for it, not of its batch mates.

    Args:
        denoise: ids int64 [B, L] -> logits [B, L, V], any float dtype. Guidance, constraints and penalties are wrappers
            around it.
        xt: int64 [B, L]; ids where ``masked`` do not matter.
        masked: bool [B, L], what to fill.
        mask_id: what stands where nothing is known yet; never drawn.
        policy: a name in ``POLICIES``, with its defaults, or a :class:`Policy`.
        steps: forwards to spread the commits over; a row with fewer masks takes fewer. None is one position a step for
            policies that work by schedule.
        block_length: fill the masked positions of a row in blocks of so many, left to right (semi-autoregressive), each
            with its share of the steps; the last may be shorter. None is one block.
        shift: logits row i predicts position i + 1; position 0 must then be given.
        temperature, top_k, top_p: of the draw, see :func:`diffullama_ext.token_stats`; temperature 0 is greedy.
        seed: 64 bits, int or int64 [1] on the device; None draws one from torch's generator.
        sample_index: int64 [B], the global number of each row; None means 0..B-1.
        on_step: called as on_step(state, stats, written) after every step, the Decision as carried out: progress bars,
            traces.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; a mask at position 0 under ``shift``.
        RuntimeError: rows where no token can be drawn (NaN logits), or that the policy left unfinished.
    """
    policy = as_policy(policy)
    score = PositionStats(shift, temperature, top_k, top_p)
    state = State.start(
        xt, masked, mask_id=mask_id, steps=steps, block_length=block_length, seed=seed, sample_index=sample_index
    )
    longest = int(masked.sum(dim=1).max()) if masked.numel() else 0
    if longest and shift and masked[:, 0].any():
        raise ValueError(
            "masked must be False at position 0 with shift=True, where no logits row predicts it (put a start token "
            f"first), got True in rows {masked[:, 0].nonzero().flatten().tolist()}"
        )
    limit = 0 if longest == 0 else longest if steps is None else steps
    on_host = xt.device.type == "cpu"
    for step in range(limit):
        state.begin(step)
        rows = policy.rows(state)
        logits = denoise(state.xt)
        check_tensor("denoise(xt)", logits, FLOATS, (*xt.shape, "V"), xt.device)
        stats = score(logits, rows, state, gather=on_host)
        written = state.apply(stats.token, policy.decide(stats, state))
        if on_step is not None:
            on_step(state, stats, written)
        # A GPU is asked only when the answer can end the loop: with one commit a step `longest` steps are enough.
        if on_host or policy.adaptive or step + 1 >= min(longest, limit):
            failed = state.masked.any(dim=1) if step + 1 == limit else state.stuck & (not policy.may_wait)
            any_failed, any_masked = torch.stack((failed.any(), state.masked.any())).tolist()
            if any_failed:
                _raise_failed(failed, rows & (stats.token < 0), state, policy)
            if not any_masked:
                break
    return Filled(state.xt, state.nfe)
