# SPDX-License-Identifier: Apache-2.0
"""CUDA against CPU, bit for bit: noise, mask words, choices. Drawn tokens may differ only at an edge of the CDF."""

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from comparison import assert_all_equal
from torch import Tensor

from diffullama_ext import AttentionMask, TokenStats, mask_tokens, token_stats, unmask

pytestmark = [pytest.mark.cuda, pytest.mark.ext]

EDGE = 1e-6  # of the CDF: how near a draw has to lie for another token
SHAPES = [(1, 1), (3, 65), (5, 4099), (64, 2048), (300, 7)]


def on_cuda(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("by_token", [False, True], ids=["p by row", "p by token"])
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_mask_tokens(batch: int, length: int, by_token: bool) -> None:
    x0 = torch.randint(0, 50000, (batch, length))
    p_mask = torch.rand((batch, length) if by_token else (batch,))
    p_mask.view(-1)[0] = 1.0
    index = torch.randint(-(2**62), 2**62, (batch,))
    for maskable in (None, torch.rand(batch, length) < 0.9):
        arguments: dict[str, Any] = {"maskable": maskable, "seed": torch.tensor([-3]), "sample_index": index}
        got = mask_tokens(x0.cuda(), p_mask.cuda(), mask_id=7, **{k: on_cuda(v) for k, v in arguments.items()})
        assert_all_equal((t.cpu() for t in got), mask_tokens(x0, p_mask, mask_id=7, **arguments))


@pytest.mark.parametrize("ratio", [0.0, 2**-32, 1e-6, 0.3, 0.5, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("length", [1, 33, 70, 1000, 2048])
def test_annealed_words(length: int, ratio: float) -> None:
    keys = {"seed": torch.tensor([2**63 - 5]), "step": torch.tensor([77])}
    cpu = AttentionMask.annealed(length, torch.tensor([ratio]), **keys)
    cuda = AttentionMask.annealed(length, torch.tensor([ratio]).cuda(), **{k: v.cuda() for k, v in keys.items()})
    assert torch.equal(cuda.words.cpu(), cpu.words)


@pytest.mark.parametrize("length", [1, 31, 64, 130, 1000])
def test_words_from_ids_and_bools(length: int) -> None:
    ids, dense = torch.randint(0, 5, (3, length)), torch.rand(2, length, length) < 0.5
    for make, value in (
        (AttentionMask.block_causal, ids),
        (AttentionMask.documents, ids),
        (AttentionMask.from_dense, dense),
    ):
        cpu, cuda = make(value), make(value.cuda())
        assert torch.equal(cuda.words.cpu(), cpu.words)
        assert torch.equal(cuda.to_dense().cpu(), cpu.to_dense())


@pytest.mark.parametrize(("q_length", "k_length"), [(1, 1), (70, 200), (512, 512), (130, 1000)])
def test_fragments_and_tile_classes(q_length: int, k_length: int) -> None:
    ops = torch.ops.diffullama
    dense = torch.rand(2, q_length, k_length) < 0.5
    dense[:, :, : k_length // 2] = True  # some tiles hold everything
    words = AttentionMask.from_dense(dense).words
    for transpose in (False, True):
        got = ops.fragment_mask.default(words.cuda(), k_length, transpose)
        assert torch.equal(got.cpu(), ops.fragment_mask.default(words, k_length, transpose))
    got = ops.mask_tile_classes.default(words.cuda(), k_length, 64, 128)
    assert torch.equal(got.cpu(), ops.mask_tile_classes.default(words, k_length, 64, 128))


@pytest.mark.parametrize("rule", ["quota", "threshold", "factor", "random"])
@pytest.mark.parametrize(("batch", "length"), [*SHAPES, (2, 9001)])
def test_unmask(batch: int, length: int, rule: str) -> None:
    confidence = torch.randint(0, 9, (batch, length)) / 8 + torch.rand(batch, 1)  # many ties
    confidence[:, ::13] = torch.nan
    xt, token = (torch.randint(-1, 50000, (batch, length)) for _ in range(2))
    masked = torch.rand(batch, length) < 0.6
    amount = torch.rand(batch) * (length if rule == "quota" else 1.5 if rule != "random" else 1.0)
    tensors = (xt, masked, token, confidence.float(), amount)
    keys: dict[str, Any] = {"seed": 11, "step": 2**31 + 5, "rule": rule}
    index = torch.randint(0, 2**40, (batch,))
    got = unmask(*(t.cuda() for t in tensors), sample_index=index.cuda(), **keys)
    assert_all_equal((t.cpu() for t in got), unmask(*tensors, sample_index=index, **keys))


DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "whole": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "all": {"temperature": 1.1, "top_k": 200, "top_p": 0.95},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED, STEP, FORBID = 12345, 6, 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("rows", "vocab"), [(700, 1), (500, 1003), (200, 32000), (40, 151936)])
def test_tokens_and_statistics(rows: int, vocab: int, draw: str, dtype: str) -> None:
    logits = (4 * torch.randn(rows, vocab)).to(DTYPES[dtype])
    index = torch.randint(0, 2**40, (rows,))
    options: dict[str, Any] = {"seed": SEED, "step": STEP, "forbid": FORBID if vocab > FORBID else None, **DRAWS[draw]}
    current = torch.randint(0, vocab, (rows,))
    cpu = token_stats(logits, row_index=index, current=current, **options)
    got = token_stats(logits.cuda(), row_index=index.cuda(), current=current.cuda(), **options)
    cuda = TokenStats(*(t.cpu() for t in got))
    differing = (cuda.token != cpu.token).nonzero().flatten().tolist()
    if draw == "greedy":
        assert not differing
    for row in differing:
        tokens = sorted((int(cuda.token[row]), int(cpu.token[row])))
        assert edge_distance(logits[row], int(index[row]), tokens, options) < EDGE
    same = cuda.token == cpu.token
    for name in ("prob", "sample_prob"):
        torch.testing.assert_close(getattr(cuda, name)[same], getattr(cpu, name)[same], rtol=1e-4, atol=1e-7)
    for name in ("p1", "p2", "gap", "entropy", "logsumexp", "current_prob"):
        torch.testing.assert_close(getattr(cuda, name), getattr(cpu, name), rtol=1e-4, atol=1e-5)


def edge_distance(logits: Tensor, row_index: int, tokens: list[int], options: dict[str, Any]) -> float:
    """How far the row's uniform is from the farther edge of the CDF that it must lie on to give either token."""
    truncation = {"top_k": options.get("top_k"), "top_p": options.get("top_p", 1.0), "forbid": options["forbid"]}
    p = oracles.truncated(logits.tolist(), temperature=options["temperature"], **truncation)
    words = oracles.philox(
        row_index & oracles.MASK32, row_index >> 32, oracles.TAG_TOKEN, options["step"], options["seed"]
    )
    uniform = ((int(words[0]) << 30) | (int(words[1]) >> 2)) / 2**62
    cdf = np.cumsum(p)
    return float(max(abs(uniform - cdf[tokens[0]]), abs(uniform - cdf[tokens[1] - 1])))


def test_edge_distance_is_near_zero_only_at_an_edge() -> None:
    """The allow-list itself: for the token drawn and its neighbour the uniform is between their edges."""
    logits = torch.zeros(8)
    options: dict[str, Any] = {"temperature": 1.0, "forbid": None, "seed": 1, "step": 0}
    drawn = int(token_stats(logits[None].cuda(), seed=1).token[0])
    assert edge_distance(logits, 0, [drawn, drawn + 1] if drawn < 7 else [6, 7], options) <= 1 / 8
    assert edge_distance(logits, 0, [0, 7], options) > 1 / 8
