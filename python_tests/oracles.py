# SPDX-License-Identifier: Apache-2.0
"""Independent oracles: straight-line Python, numpy and plain PyTorch that share no code with diffullama_ext."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
TAG_NOISE, TAG_ATTENTION_MASK, TAG_TOKEN, TAG_UNMASK, TAG_TIME, TAG_REPLACEMENT, TAG_CHOICE = 1, 2, 3, 4, 5, 6, 7

# --- random words ----------------------------------------------------------------------------------------------------


def philox(c0: Any, c1: Any, c2: Any, c3: Any, seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011) of broadcast 32-bit counters under a 64-bit key: [..., 4] uint64."""
    c: list[Any] = [np.asarray(x, dtype=np.uint64) for x in np.broadcast_arrays(c0, c1, c2, c3)]
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]  # 64-bit products
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK32, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK32]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return np.stack(c, axis=-1)


def words_by_position(sample_index: Sequence[int], length: int, seed: int, tag: int, high: int | None) -> np.ndarray:
    """[B, length] words of counter (position/4, sample low, tag, high), lane position % 4; high None: sample high."""
    sample = np.asarray([s & MASK32 for s in sample_index], dtype=np.uint64)[:, None]
    last = np.asarray([(s >> 32) & MASK32 for s in sample_index], dtype=np.uint64)[:, None] if high is None else high
    position = np.arange(length, dtype=np.uint64)
    words = philox((position // 4)[None], sample, tag, last, seed)  # [B, length, 4]
    return np.take_along_axis(words, (position % 4).astype(np.int64)[None, :, None], axis=2)[..., 0]


def threshold(p: Any) -> np.ndarray:
    """floor(p * 2**32) of float32 probabilities, in exact integers."""
    return np.floor(np.asarray(p, dtype=np.float32).astype(np.float64) * 2.0**32).astype(np.uint64)


def annealed_allowed(length: int, ratio: float, seed: int, step: int, queries: np.ndarray | None = None) -> np.ndarray:
    """bool [queries, length]: k <= q, or u < ratio * 2**32, u made of one bit of each of 32 planes of random words.

    All queries where none are given.
    """
    q, k = (np.arange(length) if queries is None else queries)[:, None], np.arange(length)[None, :]
    u = np.zeros((q.size, length), dtype=np.uint64)
    for plane in range(32):
        words = philox(8 * (k // 32) + plane // 4, q, TAG_ATTENTION_MASK, step & MASK32, seed)[..., plane % 4]
        bit = (words >> (k % 32).astype(np.uint64)) & 1
        u |= (1 - bit) << plane
    return (k <= q) | (u < threshold(ratio))


# --- loss ------------------------------------------------------------------------------------------------------------


def dense_nll(
    logits: Tensor, x0: Tensor, masked: Tensor, shift: bool, label_smoothing: float = 0.0, softcap: float | None = None
) -> Tensor:
    """[B, L] cross-entropy of each masked token under the row that predicts it, by torch's own; 0 elsewhere."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    scored = [(b, j) for b, j in masked.nonzero().tolist() if not shift or j >= 1]
    out = torch.zeros(x0.shape, dtype=logits.dtype, device=logits.device)
    if not scored:
        return out + 0.0 * logits.sum()
    b, j = torch.tensor(scored, device=x0.device).T
    nll = torch.nn.functional.cross_entropy(
        logits[b, j - int(shift)], x0[b, j], reduction="none", label_smoothing=label_smoothing
    )
    return out.index_put((b, j), nll)


def denominator(name: str, masked: Tensor, maskable: Tensor | None, shift: bool) -> list[float]:
    """What each sequence's weighted sum is divided by before all are added, for a named normaliser."""
    batch, length = masked.shape
    able = [[maskable is None or bool(maskable[b, j]) for j in range(length)] for b in range(batch)]
    first = int(shift)
    tokens = [sum(row[first:]) for row in able]
    scored = [sum(masked[b, first:].tolist()) for b in range(batch)]
    return {
        "tokens": [max(sum(tokens), 1)] * batch,
        "masked": [max(sum(scored), 1)] * batch,
        "sequence": [batch * max(n, 1) for n in tokens],
        "batch": [batch] * batch,
    }[name]


# --- attention -------------------------------------------------------------------------------------------------------


def row_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, key_padding: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax over each query's own keys, one query at a time; (out, lse), zeros and -inf where it has none."""
    batch, heads, q_length, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q) + 0.0 * (q.sum() + k.sum() + v.sum())  # a gradient of 0 where no query has a key
    lse = torch.full(q.shape[:3], -torch.inf, dtype=q.dtype, device=q.device)
    for b in range(batch):
        for i in range(q_length):
            keys = torch.ones(k.shape[2], dtype=torch.bool, device=q.device)
            if allowed is not None:
                keys &= allowed[b if allowed.shape[0] > 1 else 0, i]
            if key_padding is not None:
                keys &= key_padding[b]
            if not keys.any():
                continue
            for h in range(heads):
                scores = scale * (k[b, h // group, keys] @ q[b, h, i])
                lse[b, h, i] = torch.logsumexp(scores.detach(), dim=0)
                out[b, h, i] = torch.softmax(scores, dim=0) @ v[b, h // group, keys]
    return out, lse


# --- sampling --------------------------------------------------------------------------------------------------------


def truncated(
    logits: Sequence[float], temperature: float, top_k: int | None, top_p: float, forbid: int | None
) -> np.ndarray:
    """The distribution of the draw, [V] float64: temperature, then top-k, then the shortest prefix reaching top_p."""
    x = np.asarray(logits, dtype=np.float64).copy()
    if forbid is not None:
        x[forbid] = -np.inf
    order = sorted(range(x.size), key=lambda i: (-x[i], i))[: top_k or x.size]
    weight = {i: float(np.exp((x[i] - x.max()) / temperature)) for i in order}
    total, before = sum(weight.values()), 0.0
    p = np.zeros(x.size)
    for i in order:
        if top_p < 1.0 and before >= top_p * total:
            break
        p[i] = weight[i]
        before += weight[i]
    return p / p.sum()


def inverse_cdf(p: np.ndarray, row_index: int, seed: int, step: int) -> int:
    """The id whose cumulative share first exceeds the row's 62-bit uniform, in exact integers of weight 2**-44."""
    mass = [round(x * 2**44) for x in (p / p.max()).tolist()]
    words = philox(row_index & MASK32, (row_index >> 32) & MASK32, TAG_TOKEN, step & MASK32, seed)
    uniform = (int(words[0]) << 30) | (int(words[1]) >> 2)
    target, below = uniform * sum(mass) >> 62, 0
    for token, m in enumerate(mass):
        below += m
        if below > target:
            return token
    raise AssertionError("the uniform is below 1, so some cumulative share exceeds it")


def committed(
    masked: Sequence[bool], token: Sequence[int], confidence: Sequence[float], amount: float, rule: str, words: Sequence
) -> list[int]:
    """Positions that :func:`diffullama_ext.unmask` commits in one sequence, by the text of its docstring."""
    eligible = [j for j in range(len(masked)) if masked[j] and token[j] >= 0 and not np.isnan(confidence[j])]
    if not eligible:
        return []
    if rule == "random":
        by_word = sorted(eligible, key=lambda j: (words[j], j))
        return [j for j in eligible if words[j] < threshold(amount)] or by_word[:1]
    ranked = sorted(eligible, key=lambda j: (-confidence[j], j))
    if rule == "quota":
        n = int(amount)
    elif rule == "threshold":
        n = sum(bool(confidence[j] >= np.float32(amount)) for j in ranked)
    else:
        one, n = np.float32(1), 0
        while n < len(ranked) and confidence[ranked[n]] >= one - np.float32(amount) / np.float32(n + 2):
            n += 1
    return ranked[: max(n, 1)]
