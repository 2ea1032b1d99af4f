# SPDX-License-Identifier: Apache-2.0
"""The random words: Random123's known answers for the oracle, the reference and the C++ host function."""

from types import ModuleType

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffullama_ext import _library
from diffullama_ext.reference import noising, philox

# counter, key, words: the test vectors of Salmon et al.'s Random123 for philox4x32-10.
KNOWN: dict[str, tuple[list[int], list[int], str]] = {
    "zeros": ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}
WORD = st.integers(0, 2**32 - 1)


def _signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


@pytest.fixture
def host() -> ModuleType:
    module = _library.host_module()
    if module is None:
        pytest.skip("_C was not built")
    return module


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, words = KNOWN[name]
    seed = key[0] | key[1] << 32
    expected = [int(word, 16) for word in words.split()]
    assert oracles.philox(counter[0], counter[1], counter[2], counter[3], seed).tolist() == expected
    c = [torch.tensor(x) for x in counter]
    assert philox.philox(c[0], c[1], c[2], c[3], torch.tensor([_signed(seed)])).tolist() == expected


@pytest.mark.ext
@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_on_the_host(name: str, host: ModuleType) -> None:
    counter, key, words = KNOWN[name]
    index = np.array([counter[0] | counter[1] << 32], dtype=np.uint64)
    got = host.philox_words(key[0] | key[1] << 32, index, counter[2], np.array([counter[3]], dtype=np.uint32))
    assert [f"{word:08x}" for word in got[0].tolist()] == words.split()


@given(counter=st.lists(WORD, min_size=4, max_size=4), seed=st.integers(0, 2**64 - 1))
def test_matches_oracle(counter: list[int], seed: int) -> None:
    c0, c1, c2, c3 = (torch.tensor([x]) for x in counter)
    got = philox.philox(c0, c1, c2, c3, torch.tensor(_signed(seed)))
    assert got[0].tolist() == oracles.philox(counter[0], counter[1], counter[2], counter[3], seed).tolist()


def test_counters_broadcast() -> None:
    rows, columns = torch.arange(3)[:, None], torch.arange(5)[None]
    words = philox.philox(rows, columns, 7, torch.tensor(9), torch.tensor([3]))
    assert words.shape == (3, 5, 4)
    assert words[2, 4].tolist() == oracles.philox(2, 4, 7, 9, 3).tolist()


PROBABILITIES = [0.0, 2.0**-33, 2.0**-32, 1e-4, 0.3, 0.5, 1 - 2.0**-24, 1.0, -0.5, 7.0, float("nan")]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_threshold_is_exact(p: float) -> None:
    inside = 0.0 if np.isnan(p) else min(max(p, 0.0), 1.0)
    assert int(philox.threshold32(torch.tensor(p))) == int(oracles.threshold(inside))


@pytest.mark.ext
@pytest.mark.parametrize("p", PROBABILITIES)
def test_threshold_on_the_host(p: float, host: ModuleType) -> None:
    assert host.threshold32(float(np.float32(p))) == int(philox.threshold32(torch.tensor(p)))


def test_tags_keep_ops_apart() -> None:
    """Two ops with one seed draw from disjoint counters."""
    tags = [value for name, value in vars(philox).items() if name.startswith("TAG_")]
    assert (
        sorted(tags)
        == sorted(set(tags))
        == [
            oracles.TAG_NOISE,
            oracles.TAG_ATTENTION_MASK,
            oracles.TAG_TOKEN,
            oracles.TAG_UNMASK,
            oracles.TAG_TIME,
            oracles.TAG_REPLACEMENT,
            oracles.TAG_CHOICE,
        ]
    )


def test_words_are_uniform() -> None:
    """Every bit is set half the time, and no two bits of a word or of neighbouring words go together."""
    words = noising.noise_words(4096, torch.tensor([11]), torch.arange(64)).flatten()
    bits = ((words[:, None] >> torch.arange(32)) & 1).double() * 2 - 1  # [n, 32]
    n = bits.shape[0]
    assert bits.sum(dim=0).abs().max() < 4 * n**0.5
    together = (bits.T @ bits).fill_diagonal_(0.0)  # of one word
    shifted = bits[:-1].T @ bits[1:]  # of consecutive words
    assert max(together.abs().max(), shifted.abs().max()) < 5 * n**0.5
