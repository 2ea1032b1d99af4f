# SPDX-License-Identifier: Apache-2.0
"""Noise levels: mirrored pairs, blocks, strata over blocks, a second lane; and the curriculum of block lengths."""

from collections import Counter

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest, pearsonr

from diffullama_ext.objective import draw_t
from diffullama_ext.reference.philox import TAG_TIME
from diffullama_ext.schedules import BlockLengthCurriculum

SEED = 11


@given(first=st.integers(0, 2**40), t_min=st.floats(0, 0.4), t_max=st.floats(0.5, 1.0))
def test_antithetic_samples_mirror_each_other(first: int, t_min: float, t_max: float) -> None:
    t = draw_t(torch.arange(2 * first, 2 * first + 8), SEED, t_min=t_min, t_max=t_max, antithetic=True).double()
    torch.testing.assert_close(
        t[0::2] + t[1::2], torch.full((4,), t_min + t_max, dtype=torch.float64), rtol=0, atol=2e-7
    )
    assert len(set(t.tolist())) == 8


@pytest.mark.parametrize("how", [{}, {"antithetic": True}, {"strata": 7}], ids=str)
def test_levels_of_blocks_are_uniform_and_apart(how: dict) -> None:
    t = draw_t(torch.arange(4000), SEED, t_min=0.2, t_max=0.7, n_blocks=3, **how)
    assert t.shape == (4000, 3)
    for block in range(3):
        assert kstest(t[::2, block].numpy(), "uniform", args=(0.2, 0.5)).pvalue > 1e-3
    if not how.get("strata"):
        assert abs(pearsonr(t[::2, 0], t[::2, 1]).statistic) < 5 / 2000**0.5


def test_a_blocks_level_is_a_word_of_its_own() -> None:
    index = [3, 2**40 + 7]
    words = [[int(oracles.philox(b, i % 2**32, TAG_TIME, i >> 32, SEED)[0]) for b in range(5)] for i in index]
    expected = torch.tensor(words, dtype=torch.float64) / -(2.0**32) + 1
    assert torch.equal(draw_t(torch.tensor(index), SEED, t_min=0.0, n_blocks=5), expected.float())
    assert torch.equal(draw_t(torch.tensor(index), SEED, t_min=0.0), expected[:, 0].float())


@given(first=st.integers(0, 2**33), n_blocks=st.integers(1, 9), samples=st.integers(1, 4))
def test_strata_over_blocks(first: int, n_blocks: int, samples: int) -> None:
    """n_blocks strata fall one into each block of a sample, times the samples one into each of consecutive samples."""
    strata = n_blocks * samples
    t = draw_t(torch.arange(first, first + samples), SEED, t_min=0.0, strata=strata, n_blocks=n_blocks)
    stratum = np.ceil(t.double().numpy() * strata * (1 - 1e-7)).astype(int)
    assert sorted(stratum.flatten()) == list(range(1, strata + 1))


def test_every_block_meets_every_stratum() -> None:
    t = draw_t(torch.arange(600), SEED, strata=4, n_blocks=4)
    for block in range(4):
        counts = Counter((t[:, block] * 4).ceil().tolist())
        assert all(abs(counts[stratum] - 150) < 5 * (600 * 0.25 * 0.75) ** 0.5 for stratum in (1, 2, 3, 4))


def test_lanes_are_independent() -> None:
    first, second = (draw_t(torch.arange(4000), SEED, lane=lane) for lane in (0, 1))
    assert abs(pearsonr(first, second).statistic) < 5 / 4000**0.5
    with pytest.raises(ValueError, match=r"lane must be in \[0, 1\], got 2"):
        draw_t(torch.arange(2), SEED, lane=2)
    with pytest.raises(TypeError, match=r"n_blocks must be an int, got 2\.0"):
        draw_t(torch.arange(2), SEED, n_blocks=2.0)


def test_block_lengths_double_at_even_intervals() -> None:
    lengths = [BlockLengthCurriculum(4, 32, 9)(step) for step in range(12)]
    assert lengths == [4] * 3 + [8] * 3 + [16] * 3 + [32] * 3
    assert {BlockLengthCurriculum(6, 6)(step) for step in range(5)} == {6}
    assert [BlockLengthCurriculum(1, 8, 2)(step) for step in range(3)] == [1, 2, 8]  # more doublings than steps
    with pytest.raises(ValueError, match="block_length_start must be at least 1, got 0"):
        BlockLengthCurriculum(0, 4)
    with pytest.raises(ValueError, match="block_length_steps must be at least 0, got -1"):
        BlockLengthCurriculum(4, 8, -1)
