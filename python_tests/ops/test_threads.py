# SPDX-License-Identifier: Apache-2.0
"""Every op on one thread and on several: what is drawn, chosen and packed is the same, bit for bit; sums agree.

The suite runs with one thread a process, where no loop is ever split.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from comparison import assert_all_equal
from torch import Tensor

from diffullama_ext import (
    AttentionMask,
    attention,
    linear_shifted_cross_entropy,
    mask_tokens,
    shifted_cross_entropy,
    token_stats,
    unmask,
)

pytestmark = pytest.mark.ext
N_THREADS = (1, 2, 3, 7)


@pytest.fixture(autouse=True)
def _threads_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DIFFULLAMA_IMPL", "ext")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _mask_tokens() -> tuple[Tensor, ...]:
    x0, maskable = torch.randint(0, 99, (31, 3001)), torch.rand(31, 3001) < 0.9
    return mask_tokens(x0, torch.rand(31), mask_id=99, maskable=maskable, seed=1)


def _mask_words() -> list[Tensor]:
    ids = torch.randint(0, 9, (3, 301))
    masks = (
        AttentionMask.annealed(777, 0.3, seed=5),
        AttentionMask.documents(ids),
        AttentionMask.from_dense(torch.rand(2, 301, 301) < 0.5),
    )
    return [x for mask in masks for x in (mask.words, mask.to_dense())]


def _token_stats() -> list[Tensor]:
    logits = torch.randn(97, 1003)
    return [x for top_p in (1.0, 0.8) for x in token_stats(logits, top_p=top_p, forbid=2, seed=1)]


def _unmask() -> list[Tensor]:
    masked, token = torch.rand(37, 1001) < 0.6, torch.randint(0, 9, (37, 1001))
    confidence, amount = torch.rand(37, 1001), torch.full((37,), 0.6)
    rules = (("quota", 100.0), ("threshold", 1.0), ("factor", 1.0), ("random", 1.0))
    return [
        x
        for rule, scale in rules
        for x in unmask(token * 0, masked, token, confidence, amount * scale, rule=rule, seed=1)
    ]


def _shifted_cross_entropy() -> list[Tensor]:
    logits = torch.randn(7, 101, 503, dtype=torch.float64, requires_grad=True)
    x0, masked = torch.randint(0, 503, (7, 101)), torch.rand(7, 101) < 0.5
    loss, stats = shifted_cross_entropy(logits, x0, masked, loss_weight=torch.rand(7))
    return [loss, *stats, *torch.autograd.grad(loss, logits)]


def _linear_shifted_cross_entropy() -> list[Tensor]:
    hidden, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 101, 33), (503, 33), 503)
    )
    x0, masked = torch.randint(0, 503, (7, 101)), torch.rand(7, 101) < 0.5
    results = []
    for reduction in ("mean", "none"):
        loss, stats = linear_shifted_cross_entropy(
            hidden, weight, x0, masked, bias=bias, loss_weight=torch.rand(7), reduction=reduction
        )
        results += [loss, *stats, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))]
    return results


def _attention() -> list[Tensor]:
    q, k, v = (torch.randn(3, h, 65, 32, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    out = attention(q, k, v, AttentionMask.annealed(65, 0.4, seed=2))
    assert isinstance(out, Tensor)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def _on(n_threads: int, run: Callable[[], object]) -> list[Tensor]:
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    return list(run())  # type: ignore[call-overload]


def _runs(**by_op: Callable[[], object]) -> pytest.MarkDecorator:
    cases = [pytest.param(run, marks=pytest.mark.op(op), id=op) for op, run in by_op.items()]
    return pytest.mark.parametrize("run", cases)


@_runs(mask_tokens=_mask_tokens, annealed_mask=_mask_words, token_stats=_token_stats, unmask=_unmask)
def test_the_same_bits(run: Callable[[], object]) -> None:
    expected = _on(1, run)
    for n in N_THREADS:
        assert_all_equal(_on(n, run), expected)


@_runs(
    shifted_cross_entropy=_shifted_cross_entropy,
    linear_shifted_cross_entropy=_linear_shifted_cross_entropy,
    attention=_attention,
)
def test_the_same_sums(run: Callable[[], object]) -> None:
    """Equal beyond rounding on any number of threads, and bit for bit on the same number."""
    expected = _on(1, run)
    for n in N_THREADS:
        got = _on(n, run)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        assert_all_equal(_on(n, run), got)
