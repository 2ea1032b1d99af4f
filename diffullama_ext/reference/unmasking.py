# SPDX-License-Identifier: Apache-2.0
"""What the reverse process needs from the logits (token_stats) and the decision what to commit (unmask)."""

import torch
from torch import Tensor

from .philox import MASK32, TAG_TOKEN, TAG_UNMASK, philox, threshold32

# Probabilities are drawn as integers, round(exp((logit - max) / temperature) * 2**MASS_BITS): sums are exact and
# order-free, and 2**18 tokens of full mass still fit 62 bits. Mirrored in csrc/unmasking/unmasking_math.h.
MASS_BITS = 44


def _first_index_of(hit: Tensor) -> Tensor:
    """Lowest index of True along the last dim; the dim's size where there is none."""
    index = torch.arange(hit.shape[-1], device=hit.device)
    return torch.where(hit, index, hit.shape[-1]).amin(dim=-1)


def _nucleus(x: Tensor, mass: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the top_k largest logits, then the shortest prefix whose share reaches top_p; equal logits: lowest index."""
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    ranked = mass.gather(-1, order)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k > 0:
        keep[..., top_k:] = False
    ranked = ranked * keep
    if top_p < 1.0:
        total = ranked.sum(dim=-1, keepdim=True)
        before = ranked.cumsum(dim=-1) - ranked
        keep = keep & (before.double() < top_p * total.double())
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, keep)


def _draw(mass: Tensor, row_index: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """Inverse CDF over integer masses [N, V] in index order, with one 62-bit uniform a row; V where the mass is 0."""
    words = philox(row_index & MASK32, (row_index >> 32) & MASK32, TAG_TOKEN, step.reshape(()) & MASK32, seed)  # [N, 4]
    u = ((words[:, 0] << 30) | (words[:, 1] >> 2)) & (2**62 - 1)
    total = mass.sum(dim=-1)
    u_hi, u_lo, t_hi, t_lo = u >> 31, u & (2**31 - 1), total >> 31, total & (2**31 - 1)
    target = u_hi * t_hi + ((u_hi * t_lo + u_lo * t_hi + ((u_lo * t_lo) >> 31)) >> 31)  # floor(u * total / 2**62)
    return _first_index_of(mass.cumsum(dim=-1) > target[:, None])


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
    """See :func:`diffullama_ext.token_stats`; forbid < 0 forbids nothing. Computed in float64."""
    vocab = logits.shape[1]
    x = logits.double()
    if 0 <= forbid < vocab:
        x = x.clone()
        x[:, forbid] = -torch.inf
    top = x.amax(dim=-1)
    invalid = ~torch.isfinite(top)  # NaN somewhere, +inf, or nothing allowed (all -inf)
    x = x.masked_fill(invalid[:, None], 0.0)
    top = top.masked_fill(invalid, 0.0)

    lse = torch.logsumexp(x, dim=-1)
    p = torch.exp(x - lse[:, None])
    entropy = -(torch.where(p > 0, p * (x - lse[:, None]), 0.0)).sum(dim=-1)
    two = torch.topk(x, min(2, vocab), dim=-1).values
    second = two[:, -1] if vocab > 1 else torch.full_like(top, -torch.inf)

    if temperature == 0.0:
        token = _first_index_of(x == top[:, None])
        sample_prob = torch.ones_like(top)
    else:
        mass = torch.round(torch.exp((x - top[:, None]) / temperature) * 2.0**MASS_BITS).to(torch.int64)
        mass = mass * _nucleus(x, mass, top_k, top_p)
        token = _draw(mass, row_index, seed, step)
        sample_prob = mass.gather(-1, token[:, None]).squeeze(-1).double() / mass.sum(dim=-1).double()

    def picked(ids: Tensor) -> Tensor:
        inside = (ids >= 0) & (ids < vocab)
        return torch.where(inside, p.gather(-1, torch.where(inside, ids, 0)[:, None]).squeeze(-1), torch.nan)

    current_prob = torch.full_like(top, torch.nan) if current is None else picked(current)
    values = (
        picked(token),
        sample_prob,
        torch.exp(top - lse),
        torch.exp(second - lse),
        top - second,
        entropy,
        lse,
        current_prob,
    )
    return (token.masked_fill(invalid, -1), *(v.float().masked_fill(invalid, torch.nan) for v in values))


def _rank(score: Tensor, eligible: Tensor) -> Tensor:
    """Rank of every eligible entry by descending score, ties to the lowest position; ineligible ones come last."""
    # Two stable sorts: by score, then eligible first. A -inf score of an eligible entry still precedes the ineligible.
    by_score = torch.sort(score, dim=-1, descending=True, stable=True).indices
    by_eligible = torch.sort((~eligible).gather(-1, by_score).to(torch.int8), dim=-1, stable=True).indices
    order = by_score.gather(-1, by_eligible)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


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
    """See :func:`diffullama_ext.unmask`; returns (xt, committed, remaining)."""
    length = xt.shape[1]
    eligible = masked & (token >= 0) & ~confidence.isnan()
    amount = amount[:, None]
    if rule == "random":
        group = torch.arange((length + 3) // 4, device=xt.device)[None, :]
        sample = sample_index[:, None]
        words = philox(group, sample & MASK32, TAG_UNMASK, step.reshape(()) & MASK32, seed).flatten(1)[:, :length]
        rank = _rank(-words.double(), eligible)
        chosen = (words < threshold32(amount)) | (rank == 0)
    else:
        rank = _rank(confidence, eligible)
        if rule == "quota":
            chosen = rank < amount.nan_to_num(nan=1.0, posinf=length).clamp(min=1)
        elif rule == "threshold":
            chosen = (confidence >= amount) | (rank == 0)
        else:  # factor: the largest prefix with c_(n) >= 1 - f / (n + 1), n = 1, 2, ...
            passes = (confidence >= 1.0 - amount / (rank + 2.0)) & eligible
            n_ranked_before_a_fail = torch.where(eligible & ~passes, rank, length).sort(dim=-1).values[:, :1]
            chosen = rank < n_ranked_before_a_fail.clamp(min=1)
    committed = eligible & chosen
    return torch.where(committed, token, xt), committed, (masked & ~committed).sum(dim=-1)
