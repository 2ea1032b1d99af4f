# SPDX-License-Identifier: Apache-2.0
"""The sizes, alignments and logits at which the CUDA token_stats changes its way; on the CPU ordinary cases."""

from typing import Any

import numpy as np
import pytest
import torch
from oracles import MASK32, TAG_TOKEN, philox, truncated
from torch import Tensor

from diffullama_ext import TokenStats, token_stats

pytestmark = [pytest.mark.op("token_stats"), pytest.mark.ext]

SEED, STEP = 41, 2
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "whole": {"temperature": 0.7},
    "top-k": {"top_k": 40},
    "top-1": {"top_k": 1},
    "top-p": {"temperature": 1.3, "top_p": 0.9},
    "tiny top-p": {"top_p": 1e-6},
    "nearly all": {"top_p": 0.99999},
    "both": {"top_k": 300, "top_p": 0.8},
}
EDGE = 1e-5  # of the CDF: how near a draw has to lie for another token


def _check(logits: Tensor, given: Tensor | None = None, **draw: Any) -> None:
    """Every row by the float64 oracle: statistics, and the token that its uniform selects but for ties with an edge."""
    given = logits if given is None else given
    got = TokenStats(*(t.cpu() for t in token_stats(given, seed=SEED, step=STEP, impl="ext", **draw)))
    options = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | draw
    for n, row in enumerate(logits.double().tolist()):
        model = np.exp(np.array(row) - max(row))
        model /= model.sum()
        token = int(got.token[n])
        assert 0 <= token < len(row)
        first, second = np.sort(model)[::-1][:2] if len(row) > 1 else (model[0], 0.0)
        for value, expected in ((got.prob, model[token]), (got.p1, first), (got.p2, second)):
            assert float(value[n]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        positive = model[model > 0]
        assert float(got.entropy[n]) == pytest.approx(-(positive * np.log(positive)).sum(), rel=1e-4, abs=1e-5)
        if options["temperature"] == 0:
            assert token == int(np.argmax(row))
            continue
        p = truncated(row, forbid=None, **options)
        assert p[token] > 0
        assert float(got.sample_prob[n]) == pytest.approx(p[token], rel=1e-4)
        words = philox(n & MASK32, n >> 32, TAG_TOKEN, STEP, SEED)
        uniform = ((int(words[0]) << 30) | (int(words[1]) >> 2)) / 2**62
        below, upto = p[:token].sum(), p[: token + 1].sum()
        assert below - EDGE <= uniform < upto + EDGE


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("rows", [1, 4])  # with few rows a cluster shares each
@pytest.mark.parametrize("vocab", [1, 7, 1024, 4099, 20000])
def test_sizes(device: str, vocab: int, rows: int, draw: str) -> None:
    _check((3 * torch.randn(rows, vocab)).to(device), **DRAWS[draw])


@pytest.mark.parametrize("draw", ["greedy", "whole", "top-p"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 5, 8])
def test_rows_at_any_alignment(device: str, offset: int, dtype: torch.dtype, draw: str) -> None:
    """Rows that begin off a 16-byte boundary, each at another distance from it."""
    logits = (3 * torch.randn(3, 2051)).to(dtype)
    buffer = torch.full((3 * 2060 + offset,), torch.nan, dtype=dtype, device=device)
    view = buffer[offset:].view(3, 2060)[:, :2051]
    view.copy_(logits)
    _check(logits, view, **DRAWS[draw])


@pytest.mark.parametrize("draw", ["whole", "both"])
def test_a_row_too_long_for_shared_memory(device: str, draw: str) -> None:
    _check((3 * torch.randn(1, 262_000)).to(device), **DRAWS[draw])


def _awkward(vocab: int) -> dict[str, Tensor]:
    """Rows that mislead a sample of them, fill the list of entries near the cut, or crowd into one bin."""
    index = torch.arange(vocab)
    ramp = torch.linspace(-40, 0, vocab)
    one_chunk = torch.full((vocab,), -8.0)
    one_chunk[vocab // 2 : vocab // 2 + 8] = torch.arange(8.0)
    return {
        "equal": torch.zeros(vocab),
        "two levels": torch.where(index % 3 == 0, 1.0, 0.0),
        "ramp": ramp,
        "falling": ramp.flip(0),
        "peak": torch.where(index == vocab - 1, 60.0, torch.randn(vocab)),
        "one chunk holds the mass": one_chunk,
        "mostly forbidden": torch.where(index % 97 == 5, torch.randn(vocab), -torch.inf),
        "crowded": 1e-6 * torch.randn(vocab),
        "far apart": torch.where(index % 2 == 0, 5 * torch.randn(vocab), -1e30),
        "sorted halves": torch.cat((torch.full((vocab // 2,), 3.0), -torch.rand(vocab - vocab // 2))),
    }


@pytest.mark.parametrize("draw", ["whole", "top-k", "top-p", "tiny top-p", "nearly all", "both"])
@pytest.mark.parametrize("kind", _awkward(16))
def test_awkward_rows(device: str, kind: str, draw: str) -> None:
    _check(_awkward(6150)[kind].expand(2, -1).contiguous().to(device), **DRAWS[draw])


def test_a_row_does_not_depend_on_how_many_blocks_share_it(device: str) -> None:
    """One row alone takes a cluster, among many it has one block: the same bits."""
    many = (3 * torch.randn(40, 9000)).to(device)
    for draw in DRAWS.values():
        together = token_stats(many, seed=SEED, impl="ext", **draw)
        for n in (0, 17, 39):
            index = torch.tensor([n], device=device)
            alone = token_stats(many[n : n + 1], seed=SEED, row_index=index, impl="ext", **draw)
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a[0].nan_to_num(-1), b[n].nan_to_num(-1))
