# SPDX-License-Identifier: Apache-2.0
"""Attention on sm_90a where only a GPU can tell: long sequences, many runs, graphs; bitwise repeatable."""

import pytest
import torch
from attention_cases import Case, assert_accurate, inputs_of
from comparison import assert_all_equal
from torch import Tensor

from diffullama_ext import AttentionMask, annealed_attention, attention
from diffullama_ext.ops import attention_hopper

pytestmark = [pytest.mark.cuda, pytest.mark.ext]

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    if not attention_hopper.runs_on(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("no sm_90, or not built")
    monkeypatch.setenv("DIFFULLAMA_ATTENTION", "hopper")


@pytest.mark.parametrize("mask", ["annealed", "none", "causal", "documents", "bits of each"])
@pytest.mark.parametrize("width", [64, 128])
def test_long(width: int, mask: str) -> None:
    """More tiles than multiprocessors, more tiles of keys than stages."""
    for length, padding in ((1000, "left"), (2048, "")):
        assert_accurate(inputs_of(Case(length, length, width, BF16, (8, 2), mask, padding, batch=4), "cuda"))


@pytest.mark.parametrize("width", [64, 128])
def test_many_runs_are_equal(width: int) -> None:
    """A missing wait shows now and then."""
    i = inputs_of(Case(1111, 1111, width, BF16, (16, 4), "annealed", "right", batch=4), "cuda")
    q, k, v = (x.detach() for x in i[:3])
    first = attention(q, k, v, i.mask, key_padding=i.key_padding, return_lse=True)
    for _ in range(200):
        assert_all_equal(attention(q, k, v, i.mask, key_padding=i.key_padding, return_lse=True), first)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_many_backward_runs_are_equal(width: int, deterministic: bool) -> None:
    """Blocks wait for each other's turns; without turns dQ alone may differ."""
    i = inputs_of(Case(1111, 1111, width, BF16, (16, 4), "bits of each", "right", batch=4), "cuda")
    out = attention(i.q, i.k, i.v, i.mask, key_padding=i.key_padding, deterministic=deterministic)
    assert isinstance(out, Tensor)
    first = torch.autograd.grad(out, i[:3], i.upstream, retain_graph=True)
    for _ in range(100):
        again = torch.autograd.grad(out, i[:3], i.upstream, retain_graph=True)
        assert_all_equal(again[0 if deterministic else 1 :], first[0 if deterministic else 1 :])
        torch.testing.assert_close(again[0], first[0], rtol=2.0**-6, atol=1e-3)


def test_a_graph_replays_with_new_ratios_and_seeds() -> None:
    i = inputs_of(Case(300, 300, 64, BF16, (4, 2)), "cuda")
    ratio, seed = torch.full((1,), 0.5, device="cuda"), torch.full((1,), 3, device="cuda")

    def step() -> list[Tensor]:
        out = annealed_attention(i.q, i.k, i.v, ratio, seed=seed, deterministic=True)
        return [out.detach(), *torch.autograd.grad(out, (i.q, i.k, i.v), i.upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for value, number in ((0.0, 1), (0.3, 2), (1.0, 3)):
        ratio.fill_(value)
        seed.fill_(number)
        graph.replay()
        assert_all_equal([x.clone() for x in outputs], step())


def test_last_rows_of_a_long_call() -> None:
    """Addresses beyond 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    q = torch.randn(33, 64, 8192, 128, device="cuda", dtype=BF16)
    kv = torch.randn(33, 1, 300, 128, device="cuda", dtype=BF16)
    mask = AttentionMask.full(8192, 300, device="cuda")
    out = attention(q, kv, kv, mask)
    tail = attention(q[-1:, -1:, -128:], kv[-1:], kv[-1:])
    assert isinstance(out, Tensor)
    assert isinstance(tail, Tensor)
    assert_all_equal([out[-1:, -1:, -128:]], [tail])
