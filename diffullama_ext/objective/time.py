# SPDX-License-Identifier: Apache-2.0
"""Noise levels: of a sample or of each of its blocks, independent, stratified or in mirrored pairs."""

from __future__ import annotations

from torch import Tensor, arange, int64, where

from ..checks import check_int, check_tensor
from ..functional.random import seed_tensor
from ..reference.philox import MASK32, TAG_TIME, philox

ORDER_LANE = 2  # of the words of (seed, sample, block); 0 and 1 are levels


def check_time(t_min: float, t_max: float, strata: int, antithetic: bool) -> None:
    """What :func:`draw_t` needs of its numbers."""
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min must be in [0, 1), got {t_min!r}")
    if not t_min < t_max <= 1.0:
        raise ValueError(f"t_max must be in (t_min, 1], got {t_max!r} with t_min {t_min!r}")
    check_int("strata", strata, 0, 2**31 - 1)
    if strata and antithetic:
        raise ValueError(f"antithetic and strata={strata} exclude each other: 2 strata are near to mirrored pairs")


def draw_t(
    sample_index: Tensor,
    seed: int | Tensor,
    *,
    t_min: float = 1e-3,
    t_max: float = 1.0,
    strata: int = 0,
    antithetic: bool = False,
    n_blocks: int | None = None,
    lane: int = 0,
) -> Tensor:
    """Noise levels, each uniform in (t_min, t_max], as a function of (seed, sample_index, block) alone.

    Args:
        sample_index: [B] int64 global number of each sample.
        seed: 64 bits, int or int64 [1] on the device.
        t_min, t_max: 0 <= t_min < t_max <= 1.
        strata: n > 0 makes the samples numbered i, ..., i + n - 1 fall one into each n-th of the interval, whatever i
            is: a lower variance of the loss of n consecutive samples. With blocks the same of n consecutive
            (sample, block), the blocks of a sample in an order drawn for it: n = n_blocks is BARD's rule, n = n_blocks
            times the batch BD3-LM's. 0 is independent draws.
        antithetic: the levels of the samples 2i and 2i+1 are symmetric about the middle of the interval.
        n_blocks: blocks of a sample, each with its own level; None draws one a sample.
        lane: 0 or 1, two independent draws.

    Returns:
        float32 [B], or [B, n_blocks].
    """
    check_tensor("sample_index", sample_index, int64, ("B",))
    check_time(t_min, t_max, strata, antithetic)
    if n_blocks is not None:
        check_int("n_blocks", n_blocks, 0, 2**31 - 1)
    check_int("lane", lane, 0, 1)
    key = seed_tensor(seed, None, sample_index.device)
    drawn = sample_index // 2 if antithetic else sample_index  # the number that the draw belongs to
    block = arange(1 if n_blocks is None else n_blocks, device=sample_index.device)[None]  # [1, K]
    low, high = (drawn & MASK32)[:, None], ((drawn >> 32) & MASK32)[:, None]
    words = philox(block, low, TAG_TIME, high, key)  # [B, K, 4]
    word = words[..., lane]
    if antithetic:
        word = where((sample_index % 2 == 1)[:, None], MASK32 - word, word)
    u = word.double() / 2**32  # in [0, 1)
    if strata:
        place = sample_index[:, None]
        if n_blocks is not None:  # of consecutive samples' blocks; in block order a block would always have one stratum
            order = words[..., ORDER_LANE].argsort(dim=1, stable=True).argsort(dim=1)
            place = place * n_blocks + order
        u = (place % strata + u) / strata
    t = (t_max - (t_max - t_min) * u).float()
    return t[:, 0] if n_blocks is None else t
