# SPDX-License-Identifier: Apache-2.0
"""What the noise does to a batch: which tokens are replaced, by what, and what each weighs in the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor
from ..functional import mask_tokens
from ..functional.random import seed_tensor
from ..reference.noising import noise_words
from ..reference.philox import MASK32, TAG_REPLACEMENT, philox, threshold32
from ..schedules import LinearNoise
from .config import ObjectiveConfig
from .time import draw_t


class Noised(NamedTuple):
    """One or two views of a batch, one below the other: N = B * n_views."""

    xt: Tensor  # [N, L] int64
    noised: Tensor  # [N, L] bool, the draw
    p: Tensor  # float32 [N, 1] or [N, L]: probability, or exact share, of noised tokens
    t: Tensor  # float32 [N] or [N, blocks]


class _Draw(NamedTuple):
    """What the noise of a batch depends on."""

    config: ObjectiveConfig
    x0: Tensor  # [B, L] int64
    maskable: Tensor  # [B, L] bool
    seed: Tensor  # [1] int64
    sample_index: Tensor  # [B] int64
    block_length: int | None


def targets(
    x0: Tensor, maskable: Tensor | None, attention_mask: Tensor | None, document_ids: Tensor | None, *, shift: bool
) -> tuple[Tensor, Tensor]:
    """[B, L] bool each: tokens that may be noised, and real tokens that the logits row of a real token predicts.

    Args:
        x0: [B, L] int64; maskable: bool, attention_mask: bool or int64, document_ids: int64, each [B, L] or None.
    """
    check_tensor("x0", x0, torch.int64, ("B", "L"))
    shape = tuple(x0.shape)
    if maskable is None:
        maskable = torch.ones_like(x0, dtype=torch.bool)
    check_tensor("maskable", maskable, torch.bool, shape, x0.device)
    predicted = torch.ones_like(maskable)
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, (torch.bool, torch.int64), shape, x0.device)
        predicted &= attention_mask.bool()
        maskable = maskable & attention_mask.bool()
    if document_ids is not None:
        check_tensor("document_ids", document_ids, torch.int64, shape, x0.device)
    if shift:
        predicted[:, 1:] &= predicted[:, :-1].clone()
        predicted[:, :1] = False
        if document_ids is not None:
            predicted[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    return maskable, predicted


def noise(
    config: ObjectiveConfig,
    x0: Tensor,
    maskable: Tensor,
    seed: int | Tensor,
    sample_index: Tensor,
    t: Tensor | None,
    block_length: int | None,
) -> Noised:
    """Every view of the batch, by the config's choices.

    Args:
        x0: [B, L] int64; maskable: [B, L] bool.
        seed: int or int64 [1]; sample_index: [B] int64.
        t: noise levels, float32 [B] or [B, blocks] (of "nested" both views', [2 B, ...]); None draws them.
        block_length: of this step; None is the whole sequence.
    """
    draw = _Draw(config, x0, maskable, seed_tensor(seed, None, x0.device), sample_index, block_length)
    levels = _levels(draw, t)
    views = [_view(draw, level) for level in levels]
    if config.views == "complementary":
        views.append(_complement(draw, views[0]))
    return views[0] if len(views) == 1 else Noised(*(torch.cat(parts) for parts in zip(*views, strict=True)))


def _levels(draw: _Draw, t: Tensor | None) -> tuple[Tensor, ...]:
    """t of each view that is drawn; the complementary one follows from the first."""
    config, (batch, length) = draw.config, draw.x0.shape
    n_blocks = None if draw.block_length is None else -(-length // draw.block_length)
    nested = config.views == "nested"
    if t is None:
        levels = [
            draw_t(
                draw.sample_index,
                draw.seed,
                t_min=config.t_min,
                t_max=config.t_max,
                strata=0 if lane else config.strata,  # in one stratum both would be nearly one level
                antithetic=config.antithetic,
                n_blocks=n_blocks,
                lane=lane,
            )
            for lane in range(1 + nested)
        ]
        return (levels[0].minimum(levels[1]), levels[0].maximum(levels[1])) if nested else (levels[0],)
    shape = (batch * (1 + nested), *(() if n_blocks is None else (n_blocks,)))
    check_tensor("t", t, torch.float32, shape, draw.x0.device)
    return tuple(t.chunk(2)) if nested else (t,)


def _view(draw: _Draw, t: Tensor) -> Noised:
    """The batch noised at levels t [B] or [B, blocks]."""
    if draw.config.exact_count:
        return _exactly(draw, t)
    p_mask = LinearNoise().p_mask(t)
    p = p_mask[:, None] if draw.block_length is None else _by_token(p_mask, draw)
    if draw.config.noise == "mix":
        return _mixed(draw, t, p)
    xt, masked, _, _ = mask_tokens(
        draw.x0,
        p_mask if draw.block_length is None else p,
        mask_id=draw.config.mask_id,
        maskable=draw.maskable,
        seed=draw.seed,
        sample_index=draw.sample_index,
    )
    return Noised(xt, masked, p, t)


def _by_token(values: Tensor, draw: _Draw) -> Tensor:
    """[B, blocks] -> [B, L]."""
    assert draw.block_length is not None
    return values.repeat_interleave(draw.block_length, dim=1)[:, : draw.x0.shape[1]].contiguous()


def _exactly(draw: _Draw, t: Tensor) -> Noised:
    """Of the n maskable tokens of a sequence, or block, the ceil(t n) with the least words; ties to the lowest place.

    The words are those of mask_tokens, so a lower t masks a subset here too.
    Source: the likelihood estimator of LLaDA (Nie et al., 2025), which draws the number of masks, not each mask.
    """
    batch, length = draw.x0.shape
    width = draw.block_length or max(length, 1)
    n_blocks = -(-length // width)
    padding = (0, n_blocks * width - length)

    def by_block(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, padding, value=fill).reshape(batch, n_blocks, width)

    words = noise_words(length, draw.seed, draw.sample_index).masked_fill(~draw.maskable, MASK32 + 1)
    rank = by_block(words, MASK32 + 1).argsort(dim=2, stable=True).argsort(dim=2)
    n = by_block(draw.maskable, 0).sum(dim=2)  # [B, blocks]
    k = torch.ceil(t.reshape(batch, -1).double() * n)
    masked = (rank < k[..., None]).flatten(1)[:, :length] & draw.maskable
    share = (k / n.clamp(min=1)).float()
    p = share if draw.block_length is None else _by_token(share, draw)
    return Noised(torch.where(masked, draw.config.mask_id, draw.x0), masked, p, t)


def _mixed(draw: _Draw, t: Tensor, p: Tensor) -> Noised:
    """With phi = pi t / 2: the mask with probability 1 - cos phi, a random token with sin phi + cos phi - 1.

    A token is noised where xt != x0, which a random one need not be. One word decides; another draws the token, uniform
    over the vocabulary without the mask. Source: the mixed noise described by BARD (2604.16514).
    """
    config, length = draw.config, draw.x0.shape[1]
    assert config.vocab_size is not None
    phi = p.double() * (math.pi / 2)
    word = noise_words(length, draw.seed, draw.sample_index)
    to_mask = (word < threshold32(1 - torch.cos(phi))) & draw.maskable
    to_random = (word < threshold32(torch.sin(phi))) & draw.maskable & ~to_mask
    n_drawn = config.vocab_size - (config.mask_id < config.vocab_size)
    drawn = (_replacement_words(length, draw.seed, draw.sample_index) * n_drawn) >> 32
    drawn = drawn + (drawn >= config.mask_id)
    xt = torch.where(to_mask, config.mask_id, torch.where(to_random, drawn, draw.x0))
    return Noised(xt, to_mask | (to_random & (xt != draw.x0)), p, t)


def _replacement_words(length: int, seed: Tensor, sample_index: Tensor) -> Tensor:
    """Random words [B, L], counters as those of the noise under a tag of their own."""
    group = torch.arange((length + 3) // 4, device=sample_index.device)[None, :]
    sample = sample_index[:, None]
    return philox(group, sample & MASK32, TAG_REPLACEMENT, (sample >> 32) & MASK32, seed).flatten(1)[:, :length]


def _complement(draw: _Draw, view: Noised) -> Noised:
    """Every maskable token that ``view`` left, masked: at probability 1 - p."""
    masked = draw.maskable & ~view.noised
    return Noised(torch.where(masked, draw.config.mask_id, draw.x0), masked, 1 - view.p, 1 - view.t)


def token_weight(config: ObjectiveConfig, noised: Noised, real: Tensor) -> Tensor:
    """[N, L] float32: what the nll of each noised token weighs; real [N, L] bool is False at padding."""
    if config.loss_weight == "uniform":
        return torch.ones(noised.xt.shape, device=noised.xt.device)
    if config.loss_weight == "cart":
        return context_weight(real & ~noised.noised, config.cart_p)
    weight = LinearNoise().loss_weight(noised.p).masked_fill(noised.p == 0, 0.0)  # p = 0 noises nothing
    if config.views == "complementary":
        weight = weight * (1 + (noised.p == 1))  # the complement is empty: without it this view stands for both
    return weight.expand(noised.xt.shape)


def context_weight(visible: Tensor, p: float) -> Tensor:
    """[N, L] float32: at n the sum over visible i != n of 0.5 p (1 - p)^(|n - i| - 1).

    Distances where (1 - p)^d < 2^-30 are left out, so time and memory stay linear in L.
    Source: context-adaptive rescheduling (CART) of Dream (Ye et al., 2508.15487).
    """
    length = visible.shape[1]
    reach = max(0, min(length - 1, math.ceil(30 * math.log(2) / -math.log1p(-p))))
    distance = torch.arange(-reach, reach + 1, device=visible.device).abs()
    kernel = 0.5 * p * (1 - p) ** (distance - 1).clamp(min=0).float()
    kernel[reach] = 0.0  # of a token on itself
    return torch.nn.functional.conv1d(visible[:, None].float(), kernel[None, None], padding=reach)[:, 0]
