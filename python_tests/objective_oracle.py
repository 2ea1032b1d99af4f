# SPDX-License-Identifier: Apache-2.0
"""The objective's variants written out in loops: noise token by token, and block diffusion block by block."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from oracles import TAG_NOISE, TAG_REPLACEMENT, TAG_TIME, philox, threshold, words_by_position
from tiny_models import MASK_ID, VOCAB
from torch import Tensor

from diffullama_ext import AttentionMask
from diffullama_ext.objective import ObjectiveConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "levels in a range": {"t_min": 0.2, "t_max": 0.8},
    "antithetic": {"antithetic": True},
    "strata": {"strata": 4},
    "exact": {"exact_count": True},
    "uniform weight": {"loss_weight": "uniform"},
    "cart": {"loss_weight": "cart", "cart_p": 0.4},
    "nested": {"views": "nested", "strata": 3},
    "complementary": {"views": "complementary"},
    "exact nested": {"views": "nested", "exact_count": True},
    "exact complementary": {"views": "complementary", "exact_count": True},
    "mix": {"noise": "mix", "vocab_size": VOCAB},
    "mix nested": {"noise": "mix", "vocab_size": VOCAB, "views": "nested", "antithetic": True},
    "blocks": {"block_length": 5},
    "blocks of the whole": {"block_length": 50},
    "blocks strata": {"block_length": 4, "strata": 3},
    "blocks exact cart": {"block_length": 5, "exact_count": True, "loss_weight": "cart"},
    "blocks complementary": {"block_length": 3, "views": "complementary", "antithetic": True},
    "blocks mix": {"block_length": 4, "noise": "mix", "vocab_size": VOCAB},
}


class View(NamedTuple):
    xt: Tensor  # [B, L]
    noised: Tensor  # [B, L] bool
    weight: Tensor  # [B, L]
    t: list[list[float]]  # [B][blocks]


def noise_levels(config: ObjectiveConfig, index: int, n_blocks: int, lane: int, seed: int) -> list[float]:
    """t of each block of one sample, as float32 values."""
    number = index // 2 if config.antithetic else index
    words = [philox(block, number % 2**32, TAG_TIME, number >> 32, seed).tolist() for block in range(n_blocks)]
    order = sorted(range(n_blocks), key=lambda block: words[block][2])
    levels = []
    for block in range(n_blocks):
        word = words[block][lane]
        u = (2**32 - 1 - word if config.antithetic and index % 2 else word) / 2**32
        if config.strata and lane == 0:
            place = index if config.block_length is None else index * n_blocks + order.index(block)
            u = (place % config.strata + u) / config.strata
        levels.append(float(np.float32(config.t_max - (config.t_max - config.t_min) * u)))
    return levels


def views(config: ObjectiveConfig, x0: Tensor, maskable: Tensor, index: list[int], seed: int) -> list[View]:
    """What every view of a batch holds."""
    length = x0.shape[1]
    width = config.block_length or length
    n_blocks = math.ceil(length / width)
    words = words_by_position(index, length, seed, TAG_NOISE, high=None)
    other = words_by_position(index, length, seed, TAG_REPLACEMENT, high=None)
    levels = [[noise_levels(config, i, n_blocks, lane, seed) for i in index] for lane in (0, 1)]
    if config.views == "nested":
        pairs = [[(min(p), max(p)) for p in zip(a, b, strict=True)] for a, b in zip(*levels, strict=True)]
        levels = [[[pair[side] for pair in sample] for sample in pairs] for side in (0, 1)]
    else:
        levels = levels[:1]
    made = []
    for view_levels in levels:
        rows = [
            noised_row(config, x0[b].tolist(), maskable[b].tolist(), words[b].tolist(), other[b].tolist(), t, width)
            for b, t in enumerate(view_levels)
        ]
        made.append([torch.tensor([row[k] for row in rows]) for k in range(3)] + [view_levels])
    if config.views == "complementary":
        _, noised, p, t = made[0]
        rest = maskable & ~noised
        made.append([torch.where(rest, MASK_ID, x0), rest, 1 - p, [[1 - v for v in row] for row in t]])
    return [View(xt, noised, weights(config, noised, p), t) for xt, noised, p, t in made]


def noised_row(
    config: ObjectiveConfig,
    x0: list[int],
    maskable: list[bool],
    words: list[int],
    other: list[int],
    t: list[float],
    width: int,
) -> tuple[list[int], list[bool], list[float]]:
    """(xt, noised, p) of one sequence."""
    xt, noised, p = list(x0), [False] * len(x0), [0.0] * len(x0)
    for block, level in enumerate(t):
        places = range(block * width, min((block + 1) * width, len(x0)))
        able = [j for j in places if maskable[j]]
        k = math.ceil(level * len(able))
        chosen = sorted(able, key=lambda j: (words[j], j))[:k]
        for j in places:
            p[j] = level if not config.exact_count else k / max(len(able), 1)
        for j in able:
            phi = math.pi / 2 * level
            if config.noise == "mix":
                if words[j] < math.floor((1 - math.cos(phi)) * 2**32):
                    xt[j], noised[j] = MASK_ID, True
                elif words[j] < math.floor(math.sin(phi) * 2**32):
                    drawn = [i for i in range(VOCAB) if i != MASK_ID][other[j] * (VOCAB - 1) >> 32]
                    xt[j], noised[j] = drawn, drawn != x0[j]
            elif (j in chosen) if config.exact_count else words[j] < threshold(level):
                xt[j], noised[j] = MASK_ID, True
    return xt, noised, p


def weights(config: ObjectiveConfig, noised: Tensor, p: Tensor) -> Tensor:
    """[B, L]: 1/p, 1, or Dream's sum over the visible tokens."""
    if config.loss_weight == "uniform":
        return torch.ones(noised.shape)
    if config.loss_weight == "elbo":
        alone = 2 if config.views == "complementary" else 1  # the weight where the other view is empty
        return torch.tensor([[0.0 if q == 0 else alone if q == 1 else 1 / q for q in row] for row in p.tolist()])
    length, c = noised.shape[1], config.cart_p
    return torch.tensor(
        [
            [
                sum(0.5 * c * (1 - c) ** (abs(n - i) - 1) for i in range(length) if i != n and not row[i])
                for n in range(length)
            ]
            for row in noised.tolist()
        ]
    )


def block_nll(model: Any, xt: Tensor, x0: Tensor, scored: Tensor, shift: bool, width: int) -> Tensor:
    """[B, L] nll of each scored token, by a forward for each block over [clean blocks before it, itself noised]."""
    batch, length = x0.shape
    nll = torch.zeros(batch, length)
    for start in range(0, length, width):
        stop = min(start + width, length)
        ids = torch.cat([x0[:, :start], xt[:, start:stop]], dim=1)
        block = torch.arange(stop) // width
        mask = AttentionMask.from_dense(block[None, :] <= block[:, None])
        logits = model(ids, diffusion_mask=mask).logits
        clean = (
            model(x0[:, :start], diffusion_mask=AttentionMask.from_dense(mask.to_dense()[:, :start, :start])).logits
            if start
            else None
        )
        for b in range(batch):
            for j in range(start, stop):
                if not scored[b, j] or (shift and j == 0):
                    continue
                row = logits[b, j] if not shift else logits[b, j - 1] if j > start else clean[b, start - 1]
                nll = nll.index_put((torch.tensor(b), torch.tensor(j)), torch.logsumexp(row, dim=0) - row[x0[b, j]])
    return nll
