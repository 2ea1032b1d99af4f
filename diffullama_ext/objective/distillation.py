# SPDX-License-Identifier: Apache-2.0
"""The divergence of a student from its teacher's most likely tokens, without the logits of all tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_ALIVE = 1 << 24  # entries of one chunk of logits: 64 MB in float32


class TeacherTopK(NamedTuple):
    """What a teacher holds likely at N places."""

    ids: Tensor  # [N, K] int64
    probs: Tensor  # [N, K] float32, renormalised to 1 over the K
    vocab: int  # ids lie below it


def _chunk_rows(vocab: int) -> int:
    return max(1, LOGITS_ALIVE // vocab)


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(rows, weight, bias).to(torch.promote_types(rows.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@torch.no_grad()
def teacher_top_k(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    *,
    top_k: int,
    temperature: float,
    forbid: int,
) -> tuple[Tensor, Tensor]:
    """Ids [N, K] int64 of the teacher's ``top_k`` tokens, and softmax(logits / temperature) over them alone, float32.

    Args:
        rows: [N, H] hidden states; weight: [V, H] of the head; bias: [V] or None.
        forbid: the mask id, which is no token to learn; it may lie outside the vocabulary.

    Raises:
        ValueError: the vocabulary holds fewer than top_k tokens besides ``forbid``.
    """
    vocab = weight.shape[0]
    if top_k > vocab - (forbid < vocab):
        raise ValueError(f"distill_top_k must be at most the teacher's {vocab - (forbid < vocab)} tokens, got {top_k}")
    values, ids = [], []
    for chunk in rows.split(_chunk_rows(vocab)):
        logits = _logits(chunk, weight, bias, softcap)
        if forbid < vocab:
            logits[:, forbid] = -torch.inf
        best = logits.topk(top_k, dim=1)
        values.append(best.values)
        ids.append(best.indices)
    if not values:
        empty = rows.new_empty((0, top_k), dtype=torch.float32)
        return empty.long(), empty
    return torch.cat(ids), torch.softmax(torch.cat(values) / temperature, dim=1)


def top_k_divergence(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    teacher: TeacherTopK,
    row_weight: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Sum over rows of row_weight * sum_k q_k (log q_k - log p(id_k)), p = softmax(student's logits / temperature).

    p is over the whole vocabulary. One chunk of logits is alive; the gradients are made with the loss.

    Args:
        rows: [N, H] hidden states, float; weight: [V, H]; bias: [V] or None.
        teacher: ids below V, and q.
        row_weight: [N] float32.

    Source: the truncated forward KL of BARD (2604.16514), released code; 1/temperature scales the logits of both sides.
    """
    if teacher.vocab > weight.shape[0]:
        raise ValueError(
            f"the teacher's vocabulary has {teacher.vocab} ids, the student's {weight.shape[0]}: they must be one"
        )
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _TopKDivergence.apply(rows, weight, bias, teacher.ids, teacher.probs, row_weight, softcap, temperature)


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        rows, weight, bias, ids, probs, row_weight, softcap, temperature = inputs
        needs = ctx.needs_input_grad[:3]
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        d_rows = torch.zeros_like(rows) if needs[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=rows.device) if needs[1] else None
        d_bias = None if bias is None or not needs[2] else torch.zeros(bias.shape, dtype=wide, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):  # the dtype is chosen already
            for start in range(0, rows.shape[0], _chunk_rows(weight.shape[0])):
                part = slice(start, start + _chunk_rows(weight.shape[0]))
                logits = _logits(rows[part], weight, bias, softcap)
                logp = torch.log_softmax(logits / temperature, dim=1)  # [n, V]
                q, w = probs[part].to(wide), row_weight[part].to(wide)
                cross = torch.xlogy(q, q) - q * logp.gather(1, ids[part])
                total += (w * cross.sum(dim=1)).sum()
                if not any(needs):
                    continue
                d_logits = logp.exp_().scatter_add_(1, ids[part], -q).mul_((w / temperature)[:, None])
                if softcap:
                    d_logits *= 1 - (logits / softcap) ** 2
                if d_rows is not None:
                    d_rows[part] = d_logits.to(rows.dtype) @ weight
                if d_weight is not None:
                    d_weight += d_logits.T @ rows[part].to(wide)
                if d_bias is not None:
                    d_bias += d_logits.sum(dim=0)
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        made = [None if x is None else (x * upstream[0]).to(ctx.dtype) for x in ctx.saved_tensors]
        return (*made, None, None, None, None, None)
