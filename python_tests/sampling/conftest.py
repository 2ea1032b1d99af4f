# SPDX-License-Identifier: Apache-2.0
"""Denoisers without weights, as factories."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


@pytest.fixture(scope="session")
def one_hot_denoiser() -> Callable:
    """Knows the answer: (target [B, L], vocab, shift) -> denoise, with certainty on the target."""

    def make(target: Tensor, vocab: int, shift: bool) -> Callable[[Tensor], Tensor]:
        scored = target.roll(-1, dims=1) if shift else target  # row i scores position i + shift

        def denoise(xt: Tensor) -> Tensor:
            return 100.0 * F.one_hot(scored, vocab).float()

        denoise.leave_one_out = denoise
        return denoise

    return make


@pytest.fixture(scope="session")
def context_denoiser() -> Callable:
    """(vocab, sharpness) -> denoise whose logits depend on a token, two neighbours on each side and the position.

    Sums of table entries: a row's logits are the same bits in any batch. Beyond the ends stands token 0, so rows padded
    with 0 on the right do not see their padding. ``leave_one_out`` does without the tokens at i and i + 1.
    """

    def make(vocab: int, sharpness: float = 1.0) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(11)
        tables = sharpness * torch.randn(5, vocab, vocab, generator=generator)
        by_position = sharpness * torch.randn(512, vocab, generator=generator)

        def denoise(xt: Tensor, without: tuple[int, ...] = ()) -> Tensor:
            length = xt.shape[1]
            around = F.pad(xt, (2, 2))
            logits = by_position[:length].expand(len(xt), -1, -1)
            for offset, table in enumerate(tables):
                if offset not in without:
                    logits = logits + table[around[:, offset : offset + length]]
            return logits

        denoise.leave_one_out = lambda xt: denoise(xt, without=(2, 3))
        return denoise

    return make
