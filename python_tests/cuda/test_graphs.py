# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a training step and of a sampling step: replayed with new seeds and rates, they do what eager does."""

from collections.abc import Callable

import pytest
import torch
from comparison import assert_all_equal
from torch import Tensor

from diffullama_ext import AttentionMask, linear_shifted_cross_entropy, mask_tokens, token_stats, unmask

pytestmark = [pytest.mark.cuda, pytest.mark.ext]

MASK_ID = 99


def filled(value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((1,), value, dtype=dtype, device="cuda")


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of one call, and the tensors that every replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_noising_and_linear_loss(dtype: torch.dtype) -> None:
    """The number of masked tokens changes from replay to replay; a bound that the host knows covers all of them."""
    B, L, H, V = 4, 33, 64, 1001
    x0 = torch.randint(0, 90, (B, L), device="cuda")
    base = torch.randn(B, L, H, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, H, device="cuda") / 8).to(dtype).requires_grad_()
    seed, p_mask, index = filled(1, torch.int64), torch.full((B,), 0.5, device="cuda"), torch.arange(B, device="cuda")

    def step() -> tuple[Tensor, ...]:
        xt, masked, positions, counts = mask_tokens(x0, p_mask, mask_id=MASK_ID, seed=seed, sample_index=index)
        hidden = base * torch.where(masked, 0.5, 1.0).to(dtype)[..., None]  # a model: it depends on the noise
        loss, stats = linear_shifted_cross_entropy(
            hidden, weight, x0, masked, loss_weight=1 / p_mask, chunk_rows=50, max_scored=B * L
        )
        return (
            xt,
            masked,
            positions,
            counts,
            stats.n_scored,
            loss.detach(),
            *torch.autograd.grad(loss, (base, weight)),
        )

    graph, outputs = captured(step)
    drawn = set()
    for new_seed, rates in ((5, 0.1), (6, 1.0), (7, 0.7), (7, 0.0)):
        seed.fill_(new_seed)
        p_mask.copy_(torch.tensor([rates, 0.3 * rates, rates, rates], device="cuda"))
        graph.replay()
        replayed = [output.clone() for output in outputs]
        eager = step()
        assert_all_equal(replayed[:5], eager[:5])
        for a, b in zip(replayed[5:], eager[5:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        drawn.add(int(replayed[1].sum()))
    assert len(drawn) == 4  # the rates acted


@pytest.mark.parametrize("top_p", [1.0, 0.9], ids=["whole", "top-p"])
@pytest.mark.parametrize("rule", ["quota", "threshold", "random"])
def test_token_stats_and_unmask(rule: str, top_p: float) -> None:
    B, L, V = 3, 40, 1003
    logits = 3 * torch.randn(B * L, V, device="cuda", dtype=torch.bfloat16)
    xt = torch.full((B, L), MASK_ID, device="cuda")
    masked = torch.rand(B, L, device="cuda") < 0.7
    seed, step_number, amount = filled(1, torch.int64), filled(0, torch.int64), torch.full((B,), 1.0, device="cuda")

    def step() -> tuple[Tensor, ...]:
        stats = token_stats(logits, temperature=0.8, top_p=top_p, forbid=MASK_ID, seed=seed, step=step_number)
        token, confidence = stats.token.view(B, L), stats.prob.view(B, L)
        return (*stats, *unmask(xt, masked, token, confidence, amount, rule=rule, seed=seed, step=step_number))

    graph, outputs = captured(step)
    tokens = []
    for n, (new_seed, value) in enumerate(((5, 0.2), (6, 0.9), (6, 7.0))):
        seed.fill_(new_seed)
        step_number.fill_(n)
        amount.fill_(value if rule == "quota" else value / 7.0)
        graph.replay()
        replayed = [output.clone() for output in outputs]
        assert_all_equal(replayed, step())
        tokens.append(replayed[0])
    assert not torch.equal(tokens[0], tokens[1])  # the seed acted
    assert not torch.equal(tokens[1], tokens[2])  # the step acted


def test_annealed_mask() -> None:
    ratio, seed, step_number = filled(0.5, torch.float32), filled(1, torch.int64), filled(0, torch.int64)

    def step() -> tuple[Tensor, ...]:
        return (AttentionMask.annealed(300, ratio, seed=seed, step=step_number).words,)

    graph, outputs = captured(step)
    before = outputs[0].clone()
    for value in (0.0, 0.3, 1.0):
        ratio.fill_(value)
        step_number.add_(1)
        graph.replay()
        assert_all_equal([outputs[0].clone()], step())
        assert not torch.equal(outputs[0], before)
