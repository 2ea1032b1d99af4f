# SPDX-License-Identifier: Apache-2.0
"""What happened in a run of the reverse process: a step hook that records it within a bound of memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_int
from ..functional import TokenStats
from .loop import StepHook
from .state import Decision, State

ABSENT = -1  # in place of a token or a step where there is none


class History(NamedTuple):
    """The frames of a run, T of them, one a step unless they were merged; all on the CPU. Column 0 begins the row."""

    step: Tensor  # [T] int64, the last step (from 0) that the frame covers
    xt: Tensor  # [T, B, L] int32, after that step
    masked: Tensor  # [T, B, L] bool, after that step
    committed: Tensor  # [T, B, L] bool, written in the frame
    remasked: Tensor  # [T, B, L] bool, masked again in the frame
    token: Tensor  # [T, B, L] int32, drawn where a position was scored, -1 elsewhere
    prob: Tensor  # [T, B, L] float32, probability of `token` under softmax(logits), NaN where not scored
    entropy: Tensor  # [T, B, L] float32, nats, NaN where not scored
    candidates: Tensor  # [T, B, L, K] int32, the K most likely tokens, best first; -1 where not scored
    candidate_probs: Tensor  # [T, B, L, K] float32

    @property
    def prediction(self) -> Tensor:
        """What stands at each position after each frame, or was drawn for it; -1 where neither is. [T, B, L] int32."""
        return torch.where(self.masked, self.token, self.xt)


@dataclass(frozen=True)
class _Frame:
    """One or several steps; the fields are a time's worth of :class:`History`."""

    n_steps: int
    step: Tensor
    xt: Tensor
    masked: Tensor
    committed: Tensor
    remasked: Tensor
    token: Tensor
    prob: Tensor
    entropy: Tensor
    candidates: Tensor
    candidate_probs: Tensor

    def nbytes(self) -> int:
        values = (getattr(self, field.name) for field in fields(self))
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def then(self, later: _Frame) -> _Frame:
        """Both in one: the later state and statistics, but what stays committed keeps those of its commit."""
        rewritten = later.masked | later.committed | ~self.committed
        newer = (later.token != ABSENT) & rewritten
        statistics = {}
        for name in ("token", "prob", "entropy", "candidates", "candidate_probs"):
            old, new = getattr(self, name), getattr(later, name)
            statistics[name] = torch.where(newer if new.dim() == newer.dim() else newer[..., None], new, old)
        return _Frame(
            self.n_steps + later.n_steps,
            later.step,
            later.xt,
            later.masked,
            self.committed | later.committed,
            self.remasked | later.remasked,
            **statistics,
        )


def merge_pairs(frames: list[_Frame]) -> list[_Frame]:
    """Half as many, rounded up: every two neighbours in one."""
    return [frames[i].then(frames[i + 1]) if i + 1 < len(frames) else frames[i] for i in range(0, len(frames), 2)]


class Trace:
    """A step hook that records a run: ``trace = Trace(); generate(..., on_step=trace)``.

    When the frames would take more than ``max_bytes``, every two neighbours become one, and so again: a longer run is
    kept whole at a coarser resolution. The step, confidence and entropy of each position's commit are always exact.
    Recording copies from the device after every step, so a GPU is waited for. A new run replaces the last.

    Args:
        top_k: candidates kept for every scored position, 0 for none; they need the loop's logits.
        max_bytes: bound on the memory of the frames; two are always kept.

    Attributes (on the CPU; there once a step has been recorded):
        maskable: bool [B, L], what the run had to fill. mask_id: its mask.
        sample_index: int64 [B]. steps: steps recorded.
        commit_step: int64 [B, L], step (from 0) of the last commit, -1 where none is.
        confidence: float32 [B, L], probability of the committed token when it was committed; NaN where none is.
        entropy: float32 [B, L], of the distribution that it was drawn from, nats.
        n_remasked: int64 [B, L], how often a position was masked again.
    """

    mask_id: int
    maskable: Tensor
    sample_index: Tensor
    commit_step: Tensor
    confidence: Tensor
    entropy: Tensor
    n_remasked: Tensor

    def __init__(self, *, top_k: int = 5, max_bytes: int = 256 * 2**20) -> None:
        check_int("top_k", top_k, 0, 2**15)
        check_int("max_bytes", max_bytes, 1, 2**63 - 1)
        self.top_k, self.max_bytes = top_k, max_bytes
        self.steps = 0
        self._frames: list[_Frame] = []

    def __call__(self, state: State, stats: TokenStats, written: Decision) -> None:
        """Record a step; the arguments are the loop's."""
        if state.step == 0:
            self._begin(state)
        self.steps = state.step + 1
        frame = self._frame(state, stats, written)
        commit, remask = frame.committed, frame.remasked
        self.commit_step = torch.where(commit, state.step, self.commit_step)
        self.confidence = torch.where(commit, frame.prob, self.confidence)
        self.entropy = torch.where(commit, frame.entropy, self.entropy)
        self.n_remasked = self.n_remasked + remask.long()
        self.commit_step[frame.masked] = ABSENT
        self.confidence[frame.masked] = self.entropy[frame.masked] = torch.nan
        self._keep(frame)

    def _begin(self, state: State) -> None:
        self.mask_id = state.mask_id
        self.maskable = state.maskable.cpu()
        self.sample_index = state.sample_index.cpu()
        self.commit_step = torch.full(self.maskable.shape, ABSENT)
        self.confidence = torch.full(self.maskable.shape, torch.nan)
        self.entropy = self.confidence.clone()
        self.n_remasked = torch.zeros_like(self.commit_step)
        self._frames, self._stride = [], 1

    def _frame(self, state: State, stats: TokenStats, written: Decision) -> _Frame:
        candidates, candidate_probs = self._candidates(state, stats)
        remasked = torch.zeros_like(written.commit) if written.remask is None else written.remask
        return _Frame(
            1,
            torch.tensor(state.step),
            state.xt.int().cpu(),
            state.masked.cpu(),
            written.commit.cpu(),
            remasked.cpu(),
            stats.token.int().cpu(),
            stats.prob.float().cpu(),
            stats.entropy.float().cpu(),
            candidates.cpu(),
            candidate_probs.cpu(),
        )

    def _candidates(self, state: State, stats: TokenStats) -> tuple[Tensor, Tensor]:
        """The most likely tokens of the scored positions and their probabilities, both [B, L, K]."""
        scored, shape = state.scored, stats.token.shape
        if self.top_k == 0 or scored is None:
            return torch.empty(*shape, 0, dtype=torch.int32), torch.empty(*shape, 0)
        asked = stats.token.flatten()[scored.at] != ABSENT
        at, logits = scored.at[asked], scored.logits[asked]  # [N], [N, V]
        values, ids = logits.topk(min(self.top_k + 1, logits.shape[1]), dim=1)  # one more: the mask may be among them
        order = (ids == state.mask_id).byte().argsort(dim=1, stable=True)[:, : self.top_k]
        ids, values = ids.gather(1, order), values.gather(1, order).float()
        no_more = ids == state.mask_id  # a vocabulary of no more than K tokens
        ids = ids.masked_fill(no_more, ABSENT)
        probs = (values - stats.logsumexp.flatten()[at, None]).exp().masked_fill(no_more, torch.nan)
        k = ids.shape[1]
        all_ids = ids.new_full((stats.token.numel(), k), ABSENT).index_copy(0, at, ids)
        all_probs = probs.new_full((stats.token.numel(), k), torch.nan).index_copy(0, at, probs)
        return all_ids.int().view(*shape, k), all_probs.view(*shape, k)

    def _keep(self, frame: _Frame) -> None:
        if self._frames and self._frames[-1].n_steps < self._stride:
            self._frames[-1] = self._frames[-1].then(frame)
        else:
            self._frames.append(frame)
        if len(self._frames) > max(2, self.max_bytes // max(frame.nbytes(), 1)):
            self._frames, self._stride = merge_pairs(self._frames), 2 * self._stride

    def history(self, max_frames: int | None = None) -> History:
        """The frames, neighbours merged until there are at most ``max_frames``; ValueError where there is none."""
        if not self._frames:
            raise ValueError("the trace is empty: give it to a run as on_step first, one with something to fill")
        frames = self._frames
        while max_frames is not None and len(frames) > max(max_frames, 1):
            frames = merge_pairs(frames)
        return History(*(torch.stack([getattr(frame, name) for frame in frames]) for name in History._fields))

    def arrays(self) -> dict[str, Any]:
        """All of it as NumPy arrays, for notebooks and ``np.savez``: the history's fields and the commits'."""
        per_position = (
            {
                "commit_step": self.commit_step,
                "commit_confidence": self.confidence,
                "commit_entropy": self.entropy,
                "n_remasked": self.n_remasked,
                "maskable": self.maskable,
                "sample_index": self.sample_index,
            }
            if self._frames
            else {}
        )
        return {name: value.numpy() for name, value in {**self.history()._asdict(), **per_position}.items()}


def recording(on_step: StepHook | None, trace: bool) -> tuple[StepHook | None, Trace | None]:
    """The hook to run with, and the :class:`Trace` that it fills where one was asked for."""
    if not trace:
        return on_step, None
    record = Trace()

    def both(state: State, stats: TokenStats, written: Decision) -> None:
        record(state, stats, written)
        if on_step is not None:
            on_step(state, stats, written)

    return both, record
