# SPDX-License-Identifier: Apache-2.0
"""What the model reads: the noised tokens, or with blocks the noised and the clean ones, and who attends to whom."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention_mask import AttentionMask


class Attending(NamedTuple):
    """What the attention of a step depends on; each [B, L] or None, the same for every view."""

    attention_mask: Tensor | None  # 0 for padding
    document_ids: Tensor | None
    ratio: float | Tensor  # of the annealing
    seed: int | Tensor
    step: int | Tensor


class Streams(NamedTuple):
    """A model's inputs, and which of its rows predicts which token."""

    inputs: dict[str, object]  # keyword arguments of the forward
    rows: Tensor | None  # [L] int64: token j is predicted by row rows[j]; None: j - 1 with the shift, j without

    def predicting(self, scored: Tensor, hidden: Tensor, shift: bool) -> Tensor:
        """[n, H]: the hidden states [N, rows, H] that predict the n scored tokens of [N, L], in row-major order.

        It waits for the device to count them.
        """
        sequence, token = scored.nonzero(as_tuple=True)
        row = token - int(shift) if self.rows is None else self.rows[token]
        return hidden[sequence, row.clamp(min=0)]


def streams_of(xt: Tensor, x0: Tensor, how: Attending, block_length: int | None, shift: bool) -> Streams:
    """Of noised and clean tokens [N, L]; ``block_length`` None is diffusion over the whole sequence."""
    return one_stream(xt, how) if block_length is None else two_streams(xt, x0, how, block_length, shift)


def one_stream(xt: Tensor, how: Attending) -> Streams:
    """The noised tokens under the annealed mask, documents apart where their ids are given."""
    length = xt.shape[1]
    mask = AttentionMask.annealed(length, how.ratio, seed=how.seed, step=how.step, device=xt.device)
    if how.document_ids is not None:
        mask = mask & AttentionMask.documents(_tiled(how.document_ids, xt))
    return Streams(_inputs(xt, mask, how, copies=1), None)


def two_streams(xt: Tensor, x0: Tensor, how: Attending, block_length: int, shift: bool) -> Streams:
    """[noised | clean]: a noised block sees itself and the clean blocks before it, a clean block itself and those.

    Both streams have the same positions. While the annealing's ratio is below 1, an entry that looks ahead is open with
    that probability, as without blocks.

    With the shift, token j is predicted by the noised row j - 1 of its own block; the first token of a block by the
    clean row before it, which is what a decoder that caches finished blocks has, and which does not see the block.

    Source: Arriola et al., "Block Diffusion" (BD3-LM, ICLR 2025).
    """
    length, device = xt.shape[1], xt.device
    position = torch.arange(length, device=device)
    block = position // block_length
    mask = AttentionMask.two_streams(block)
    if isinstance(how.ratio, Tensor) or how.ratio < 1:
        not_ahead = AttentionMask.block_causal(position.repeat(2))
        mask = mask & (
            not_ahead | AttentionMask.annealed(2 * length, how.ratio, seed=how.seed, step=how.step, device=device)
        )
    if how.document_ids is not None:
        mask = mask & AttentionMask.documents(_tiled(how.document_ids, xt).repeat(1, 2))
    rows = position
    if shift:
        before = (position - 1).clamp(min=0)
        rows = torch.where(block[before] == block, before, length + before)
    return Streams(_inputs(torch.cat([xt, x0], dim=1), mask, how, copies=2), rows)


def _tiled(values: Tensor, xt: Tensor) -> Tensor:
    """[B, ...] -> [N, ...]: once for each view."""
    return values.repeat(xt.shape[0] // max(values.shape[0], 1), 1)


def _inputs(input_ids: Tensor, mask: AttentionMask, how: Attending, copies: int) -> dict[str, object]:
    inputs: dict[str, object] = {"input_ids": input_ids, "diffusion_mask": mask}
    if how.attention_mask is not None:
        inputs["attention_mask"] = _tiled(how.attention_mask, input_ids).repeat(1, copies)
    position = _positions(how, input_ids.shape[1] // copies, copies, input_ids.device)
    if position is not None:
        inputs["position_ids"] = _tiled(position, input_ids).repeat(1, copies)
    return inputs


def _positions(how: Attending, length: int, copies: int, device: torch.device) -> Tensor | None:
    """[B, L] or [1, L]: from 0 in each document, or from the first real token on; None where the model's own do."""
    if how.document_ids is not None:
        place = torch.arange(length, device=device).expand_as(how.document_ids)
        starts = torch.ones_like(how.document_ids, dtype=torch.bool)
        starts[:, 1:] = how.document_ids[:, 1:] != how.document_ids[:, :-1]
        return place - (place * starts).cummax(dim=1).values
    if how.attention_mask is not None:  # padding may be on either side
        return (how.attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.arange(length, device=device)[None] if copies > 1 else None
