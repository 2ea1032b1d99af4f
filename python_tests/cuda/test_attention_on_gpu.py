# SPDX-License-Identifier: Apache-2.0
"""Attention where only a GPU can tell: memory, graphs, models in training and under activation checkpointing."""

import pytest
import torch
from attention_cases import Case, inputs_of, run
from comparison import assert_all_equal
from tiny_models import MASK_ID, VOCAB, causal_lm, checkpoint_activations
from torch import Tensor

from diffullama_ext import AttentionMask, annealed_attention, attention
from diffullama_ext.integrations import adapt

pytestmark = [pytest.mark.cuda, pytest.mark.ext]

BF16 = torch.bfloat16


@pytest.mark.parametrize("width", [64, 128])
def test_memory_is_linear_in_the_length(width: int) -> None:
    """Forward and backward at L = 32768: no more than the tensors of size B H L D (the scores would be 4 GB a head)."""
    length, heads = 32768, 4
    mask = AttentionMask.annealed(length, 0.3, seed=1, device="cuda")
    q, k, v = (torch.randn(1, heads, length, width, device="cuda", dtype=BF16).requires_grad_() for _ in range(3))
    upstream = torch.randn_like(q)
    mask.tile_classes(64, 64)  # kept with the mask
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention(q, k, v, mask)
    assert isinstance(out, Tensor)
    torch.autograd.grad(out, (q, k, v), upstream)
    torch.cuda.synchronize()
    one = q.numel() * q.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 6.5 * one  # out, dq, dk, dv; float32 sums; lse, statistics


def test_the_last_rows_of_a_long_call_are_those_of_a_short_one() -> None:
    """Addresses beyond 2**31 elements; of one query they are the same numbers whatever the others are."""
    batch, heads, length, width = 33, 64, 8192, 128
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    q = torch.randn(batch, heads, length, width, device="cuda", dtype=BF16)
    assert q.numel() > 2**31
    kv = torch.randn(batch, 1, 300, width, device="cuda", dtype=BF16)
    out = attention(q, kv, kv)
    tail = attention(q[-1:, -1:, -128:], kv[-1:], kv[-1:])
    assert isinstance(out, Tensor)
    assert isinstance(tail, Tensor)
    assert_all_equal([out[-1:, -1:, -128:]], [tail])


def test_a_graph_replays_with_new_ratios_and_seeds() -> None:
    i = inputs_of(Case(300, 300, 64, BF16, (4, 2)), "cuda")
    ratio, seed = torch.full((1,), 0.5, device="cuda"), torch.full((1,), 3, device="cuda")

    def step() -> list[Tensor]:
        out = annealed_attention(i.q, i.k, i.v, ratio, seed=seed, deterministic=True)
        return [out.detach(), *torch.autograd.grad(out, (i.q, i.k, i.v), i.upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
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


@pytest.mark.parametrize("mask", ["none", "annealed", "causal", "documents"])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_repeated_runs_are_equal(width: int, mask: str) -> None:
    """More blocks than a GPU holds, which then run in other orders; without turns only dQ may notice."""
    i = inputs_of(Case(1000, 1000, width, BF16, (16, 8), mask, "left", batch=4), "cuda")
    first = run(i)
    for _ in range(20):
        assert_all_equal(run(i), first)
    out, lse, dq, dk, dv = run(i, deterministic=False)
    assert_all_equal([out, lse, dk, dv], [*first[:2], *first[3:]])
    torch.testing.assert_close(dq, first[2], rtol=2**-6, atol=2**-7 * float(dq.abs().max()))


def test_sums_beyond_32_bits() -> None:
    """float32 sums at more than 2**31 elements: the last head's gradients are those of a call of its own."""
    batch, heads, length, width = 5, 64, 65536, 128
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of GPU memory")
    q = torch.randn(batch, heads, length, width, device="cuda", dtype=BF16).requires_grad_()
    assert q.numel() > 2**31
    kv = torch.randn(batch, 1, 130, width, device="cuda", dtype=BF16)
    out = attention(q, kv, kv, deterministic=True)
    assert isinstance(out, Tensor)
    upstream = torch.randn_like(out)
    (dq,) = torch.autograd.grad(out, q, upstream)
    del out
    tail = q.detach()[-1:, -1:].requires_grad_()
    alone = attention(tail, kv[-1:], kv[-1:], deterministic=True)
    assert isinstance(alone, Tensor)
    assert_all_equal([dq[-1:, -1:]], torch.autograd.grad(alone, tail, upstream[-1:, -1:]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_train_with_and_without_checkpointing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 with heads of 32, so that the layers run the kernel; the gradients are those of stored activations."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    shape = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 128}
    x = torch.randint(VOCAB, (3, 50), device="cuda")
    mask = AttentionMask.annealed(50, 0.4, seed=2, device="cuda")
    padding = torch.ones(3, 50, dtype=torch.int64, device="cuda")
    padding[1, :20] = 0
    gradients = []
    for checkpointed in (False, True):
        model = adapt(causal_lm(family, **shape), mask_token=MASK_ID).to("cuda", BF16).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=False)
        logits = model(x, attention_mask=padding, diffusion_mask=mask).logits
        logits.float().square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_all_equal(*gradients)
    assert any((g != 0).any() for g in gradients[0])
