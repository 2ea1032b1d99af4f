# SPDX-License-Identifier: Apache-2.0
"""What is known of a batch between two steps of the reverse process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, check_tensor
from ..functional.random import index_tensor, seed_tensor
from ..schedules import commit_quota


def check_count(name: str, value: object, *, at_least: int = 1) -> None:
    """A Python int of at least so many, below 2**31."""
    check_int(name, value, at_least, 2**31 - 1)


class Decision(NamedTuple):
    """What a policy wants written, bool [B, L]. Commits come first: a position in both is masked again."""

    commit: Tensor  # these masked positions take the token drawn for them
    remask: Tensor | None = None  # these positions of the current block become masks again, before its last step


class Scored(NamedTuple):
    """The logits of a step, where they were computed: at least the positions that the policy asked for."""

    logits: Tensor  # [N, V] float, the mask's included
    at: Tensor  # [N] int64, the position each row scores: b * L + j


@dataclass
class State:
    """A batch in the middle of its reverse process. Policies read it, and write nothing but ``memory``.

    Every row begins at column 0, with padding, if any, after it: columns are the positions that random draws are keyed
    by. All tensors are replaced, never written in place, so that one kept from an earlier step stays what it was.

    Attributes:
        xt: int64 [B, L]; ``mask_id`` where ``masked``.
        maskable: bool [B, L], masked at the start; the rest is fixed.
        masked: bool [B, L], masked now.
        active: bool [B, L], masked and in the row's current block, the first that has a mask.
        block: int64 [B, L], number of each maskable position's block; ``block_length`` of them, in order, are a block.
        current: int64 [B], number of the row's current block; L where the row has no mask.
        in_block: bool [B, L], maskable and in the current block, masked or not.
        steps: int64 [B], steps the row may take; step: the current one, from 0.
        steps_left: int64 [B], steps the current block may still take, this one counted.
        block_steps: int64 [B], steps that were left when the current block was entered.
        nfe: int64 [B], forwards (two a step under guidance) spent while the row had a mask.
        stuck: bool [B], there was a step that committed nothing in the row although it had a mask.
        seed: int64 [1]; sample_index: int64 [B]: keys of random draws.
        width: no more positions of a row than this are asked for; known without asking the device.
        scored: the logits of the current step, set before the policy decides.
        memory: tensors that the policy keeps from step to step.
    """

    mask_id: int
    xt: Tensor
    maskable: Tensor
    masked: Tensor
    active: Tensor
    block: Tensor
    block_length: int
    current: Tensor
    in_block: Tensor
    steps: Tensor
    step: int
    steps_left: Tensor
    block_steps: Tensor
    nfe: Tensor
    stuck: Tensor
    seed: Tensor
    sample_index: Tensor
    width: int = 0
    scored: Scored | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        xt: Tensor,
        masked: Tensor,
        *,
        mask_id: int,
        steps: int | None,
        block_length: int | None,
        seed: int | Tensor | None,
        sample_index: Tensor | None,
    ) -> State:
        """The state before the first step; masks are written wherever ``masked`` is True."""
        check_tensor("xt", xt, torch.int64, ("B", "L"))
        batch, length = xt.shape
        check_tensor("masked", masked, torch.bool, (batch, length), xt.device)
        check_count("mask_id", mask_id, at_least=0)
        if steps is not None:
            check_count("steps", steps)
        if block_length is not None:
            check_count("block_length", block_length)
        n_masked = masked.sum(dim=1)  # [B]
        row_steps = n_masked if steps is None else torch.full_like(n_masked, steps)
        size = max(length, 1) if block_length is None else block_length
        if block_length is not None and steps is not None and masked.any():
            n_blocks = -(-int(n_masked.max()) // size)
            if steps < n_blocks:
                raise ValueError(f"steps must be at least the {n_blocks} blocks of {size} positions, got {steps}")
        ordinal = masked.cumsum(dim=1) - masked.long()  # [B, L], maskable positions before this one
        return cls(
            mask_id=mask_id,
            xt=torch.where(masked, mask_id, xt),
            maskable=masked,
            masked=masked,
            active=masked,
            block=ordinal // size,
            block_length=size,
            current=torch.full_like(n_masked, -1),  # none has been entered
            in_block=masked,
            steps=row_steps,
            step=0,
            steps_left=row_steps,
            block_steps=row_steps,
            nfe=torch.zeros_like(n_masked),
            stuck=torch.zeros_like(n_masked, dtype=torch.bool),
            seed=seed_tensor(seed, None, xt.device),
            sample_index=index_tensor("sample_index", sample_index, batch, xt.device),
        )

    def begin(self, step: int) -> None:
        """Enter a step: find each row's current block and the steps it has left."""
        self.step = step
        self.scored = None  # its memory is for the next forward
        length = self.masked.shape[1]
        current = torch.where(self.masked, self.block, length).amin(dim=1)  # [B]; `length` where nothing is masked
        self.in_block = self.maskable & (self.block == current[:, None])
        self.active = self.masked & self.in_block
        # A block takes steps in proportion to its positions, so the shares add up to `steps`, and each is at least 1
        # where there are no more blocks than steps. A row ahead of its schedule has the steps that it saved.
        n_maskable = self.maskable.sum(dim=1)
        through = torch.minimum((current + 1) * self.block_length, n_maskable)  # positions up to the block's end
        self.steps_left = (through * self.steps // n_maskable.clamp(min=1) - step).clamp(min=1)
        self.block_steps = torch.where(current == self.current, self.block_steps, self.steps_left)
        self.current = current

    def end_after(self, eos_id: int) -> None:
        """Behind the first ``eos_id`` with nothing masked before it, everything maskable becomes ``eos_id`` too."""
        settled = self.masked.cumsum(dim=1) == 0
        ended = (self.maskable & settled & (self.xt == eos_id)).cumsum(dim=1) > 0
        self.xt = torch.where(ended & self.maskable, eos_id, self.xt)
        self.masked = self.masked & ~ended

    def quota(self) -> Tensor:
        """Tokens to commit now so that the current block of each row ends on schedule, [B]."""
        return commit_quota(self.active.sum(dim=1), self.steps_left)

    def apply(self, token: Tensor, decision: Decision, n_forwards: int = 1) -> Decision:
        """Write a decision, and return what was written: never a position without a token, never a fixed one.

        What is behind the current block stays (a cache may hold it), and in a block's last step all of it.
        """
        unfinished = self.masked.any(dim=1)
        commit = decision.commit & self.masked & (token >= 0)
        self.nfe = self.nfe + n_forwards * unfinished
        self.stuck = self.stuck | (unfinished & ~commit.any(dim=1))
        self.xt = torch.where(commit, token, self.xt)
        self.masked = self.masked & ~commit
        if decision.remask is None:
            return Decision(commit)
        remask = decision.remask & self.in_block & (self.steps_left > 1)[:, None]
        self.xt = torch.where(remask, self.mask_id, self.xt)
        self.masked = self.masked | remask
        return Decision(commit, remask)
