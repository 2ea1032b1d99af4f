# SPDX-License-Identifier: Apache-2.0
"""The reverse process: forward, statistics of the masked positions, a decision, a write, and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import TokenStats
from .denoisers import Denoiser, RowDenoiser, as_row_denoiser
from .logits_hooks import LogitsHook
from .policies import Policy, as_policy
from .state import Decision, Scored, State, check_count
from .statistics import PositionStats

StepHook = Callable[[State, TokenStats, Decision], None]

# Steps between two questions to a device "are all rows through?", each of which makes the host wait. 1 on the CPU.
DONE_EVERY = 8


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


def _step_stats(
    denoise: RowDenoiser, score: PositionStats, hooks: Sequence[LogitsHook], policy: Policy, state: State
) -> tuple[TokenStats, Tensor]:
    """Statistics [B, L] of a step, and the positions bool [B, L] that the policy asked for."""
    rows = policy.rows(state)

    def hooked(scored: Scored) -> Scored:
        for hook in hooks:
            scored = Scored(hook(scored, state), scored.at)
        return scored

    if not policy.verifies:
        return score(hooked(denoise.score(state, rows)), rows, state), rows
    verify = getattr(denoise, "verify", None)
    if verify is None:
        raise ValueError(f"{policy!r} needs a denoiser that can verify, {type(denoise).__name__} cannot")
    scored, unseen = verify(state, rows)
    judged = score(hooked(unseen), rows, state).current_prob
    return score(hooked(scored), rows, state)._replace(current_prob=judged), rows


def _check_shift(masked: Tensor, shift: bool) -> None:
    if shift and masked[:, :1].any():
        raise ValueError(
            "masked must be False at position 0 with shift=True, where no logits row predicts it (put a start token "
            f"first), got True in rows {masked[:, 0].nonzero().flatten().tolist()}"
        )


@torch.no_grad()
def fill(
    denoise: Denoiser | RowDenoiser,
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
    logits_hooks: Sequence[LogitsHook] = (),
    eos_id: int | None = None,
    done_every: int | None = None,
) -> Filled:
    """Fill the masked positions of a batch; everything else is context, on either side, and never changes.

    Every row begins at column 0; padding comes after it and is fixed (the denoiser knows about it). A row's text is a
    function of the seed, its sample index, its own tokens and the denoiser's logits for it, not of its batch mates.

    Args:
        denoise: ids int64 [B, L] -> logits [B, L, V], any float dtype; or a :class:`RowDenoiser`, which computes
            only the rows asked for (models, caches, guidance).
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
            traces. ``state.scored`` holds the logits of the step.
        logits_hooks: each called as hook(scored, state), to return the logits [N, V] changed: forced and forbidden
            tokens, penalties.
        eos_id: where it stands with nothing masked before it, the row ends: all maskable positions behind become it.
        done_every: steps between two looks whether all rows are through, for policies that may be early; None is 1 on
            the CPU and 8 on a device, which has to be waited for. It changes how many forwards run, not the result.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; a mask at position 0 under ``shift``.
        RuntimeError: rows where no token can be drawn (NaN logits), or that the policy left unfinished.
    """
    policy = as_policy(policy)
    score = PositionStats(temperature, top_k, top_p)
    state = State.start(
        xt, masked, mask_id=mask_id, steps=steps, block_length=block_length, seed=seed, sample_index=sample_index
    )
    _check_shift(masked, shift)
    on_host = xt.device.type == "cpu"
    if done_every is None:
        done_every = 1 if on_host else DONE_EVERY
    check_count("done_every", done_every)
    if eos_id is not None:
        check_count("eos_id", eos_id, at_least=0)
    rows_of = as_row_denoiser(denoise, shift)
    longest = int(masked.sum(dim=1).max()) if masked.numel() else 0
    state.width = longest if policy.beyond_block else min(longest, state.block_length)
    limit = 0 if longest == 0 else longest if steps is None else steps
    may_be_early = on_host or policy.adaptive or eos_id is not None
    asks_active = type(policy).rows is Policy.rows
    for step in range(limit):
        state.begin(step)
        stats, rows = _step_stats(rows_of, score, logits_hooks, policy, state)
        written = state.apply(stats.token, policy.decide(stats, state), getattr(rows_of, "n_forwards", 1))
        if eos_id is not None:
            state.end_after(eos_id)
        if on_step is not None:
            on_step(state, stats, written)
        # A GPU is asked only when the answer can end the loop: with one commit a step `longest` steps are enough.
        last = step + 1 == limit
        looks = (may_be_early or step + 1 > longest) and (step + 1) % done_every == 0
        if last or looks or step + 1 == longest:
            failed = state.masked.any(dim=1) if last else state.stuck & (not policy.may_wait)
            n_failed, n_most = torch.stack((failed.sum(), state.masked.sum(dim=1).max())).tolist()
            if n_failed:
                _raise_failed(failed, rows & (stats.token < 0), state, policy)
            if n_most == 0:
                break
            if asks_active:
                state.width = min(state.width, n_most)
    return Filled(state.xt, state.nfe)
