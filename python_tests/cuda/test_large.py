# SPDX-License-Identifier: Apache-2.0
"""More than 2**31 elements: the far end of each result equals that of a small call on the far end of the input.

Every op's item is keyed by a number that the caller gives, so a slice with its own numbers is the same work.
"""

from collections.abc import Iterator

import oracles
import pytest
import torch
from comparison import assert_all_equal

from diffullama_ext import (
    AttentionMask,
    linear_shifted_cross_entropy,
    mask_tokens,
    shifted_cross_entropy,
    token_stats,
    unmask,
)

pytestmark = [pytest.mark.cuda, pytest.mark.ext]

BEYOND = 2**31
SEED = 5


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def needs_gb(needed: float) -> None:
    """Skips the test on a smaller or busy GPU."""
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < needed:
        pytest.skip(f"needs {needed} GB of GPU memory, {free:.0f} are free")


def arange(n: int) -> torch.Tensor:
    return torch.arange(n, device="cuda")


def test_mask_tokens() -> None:
    needs_gb(62)
    B, L = 32769, 65536
    assert B * L > BEYOND
    x0, p_mask = torch.randint(0, 9, (1, L), device="cuda").expand(B, L), torch.full((B,), 0.25, device="cuda")
    xt, masked, positions, counts = mask_tokens(x0, p_mask, mask_id=99, seed=SEED, sample_index=arange(B) + 7)
    last = mask_tokens(x0[-2:], p_mask[-2:], mask_id=99, seed=SEED, sample_index=arange(B)[-2:] + 7)
    assert_all_equal((xt[-2:], masked[-2:], counts[-2:]), (last.xt, last.masked, last.counts))
    total, tail = int(counts.sum()), int(last.counts.sum())
    assert_all_equal([positions[total - tail : total]], [last.positions[:tail] + (B - 2) * L])
    assert int(positions[total:].max()) == -1
    assert abs(total - B * L / 4) < 6 * (B * L * 3 / 16) ** 0.5


def test_annealed_mask() -> None:
    needs_gb(12)
    length, ratio = 266_240, 0.25  # 2.2e9 words
    words = AttentionMask.annealed(length, torch.full((1,), ratio, device="cuda"), seed=SEED).words[0]
    assert words.numel() > BEYOND
    row, column = length - 33, length // 32 - 1  # the word with the last key of the last row but 32: all its bits drawn
    drawn = 0
    for plane in range(32):  # from the lowest plane up, and where the rate's bit is 0, or where it is 1
        word = int(oracles.philox(8 * column + plane // 4, row, oracles.TAG_ATTENTION_MASK, 0, SEED)[plane % 4])
        drawn = drawn | word if (int(ratio * 2**32) >> plane) & 1 else drawn & word
    assert int(words[row, column]) & oracles.MASK32 == drawn
    assert (words[length - 1] == -1).all()  # causal: it sees every key


def test_token_stats() -> None:
    needs_gb(12)
    N, V = 16384, 151936
    assert N * V > BEYOND
    logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16) * 4
    for draw in ({"temperature": 0.0}, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.9}):
        got = token_stats(logits, seed=SEED, row_index=arange(N), **draw)
        last = token_stats(logits[-5:].clone(), seed=SEED, row_index=arange(N)[-5:], **draw)
        assert_all_equal((field[-5:] for field in got), last)


def test_unmask() -> None:
    needs_gb(75)
    B, L = 32769, 65536
    xt = torch.zeros(1, L, dtype=torch.int64, device="cuda").expand(B, L)
    token = torch.randint(1, 9, (1, L), device="cuda").expand(B, L)
    masked = torch.ones(1, L, dtype=torch.bool, device="cuda").expand(B, L)
    confidence = torch.rand(1, L, device="cuda").expand(B, L)
    amount = torch.full((B,), 300.0, device="cuda")
    got = unmask(xt, masked, token, confidence, amount, seed=SEED, sample_index=arange(B))
    tensors = (xt[-3:], masked[-3:], token[-3:], confidence[-3:], amount[-3:])
    last = unmask(*tensors, seed=SEED, sample_index=arange(B)[-3:])
    assert_all_equal((field[-3:] for field in got), last)
    assert (got.remaining == L - 300).all()


def test_shifted_cross_entropy() -> None:
    needs_gb(26)
    B, L, V = 3, 5700, 151936
    logits = torch.randn(B, L, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert logits.numel() > BEYOND
    x0, masked = torch.randint(0, V, (B, L), device="cuda"), torch.rand(B, L, device="cuda") < 0.5
    nll, _ = shifted_cross_entropy(logits, x0, masked, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    tail = logits[-1:, -40:].detach().clone().requires_grad_()
    last, _ = shifted_cross_entropy(tail, x0[-1:, -40:], masked[-1:, -40:], reduction="none")
    (expected,) = torch.autograd.grad(last.sum(), tail)
    assert_all_equal((nll[-1, -39:], gradient[-1, -40:]), (last[0, 1:], expected[0]))


@pytest.mark.parametrize(("L", "H", "V"), [(1_048_700, 2048, 64), (64, 16400, 131_072)], ids=["hidden", "weight"])
def test_linear_shifted_cross_entropy(L: int, H: int, V: int) -> None:
    """Either input has more than 2**31 elements; few tokens are scored."""
    needs_gb(30)
    hidden = torch.randn(1, L, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(V, H, device="cuda", dtype=torch.bfloat16) / H**0.5).requires_grad_()
    assert max(hidden.numel(), weight.numel()) > BEYOND
    x0, masked = torch.randint(V - 30, V, (1, L), device="cuda"), torch.zeros(1, L, dtype=torch.bool, device="cuda")
    masked[:, -20:] = True
    loss, stats = linear_shifted_cross_entropy(hidden, weight, x0, masked, reduction="sum", max_scored=20)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert int(stats.n_scored) == 20

    rows = hidden[0, -21:-1].detach().float().requires_grad_()
    logits = torch.cat([rows @ part.float().T for part in weight.detach().split(4096)], dim=1)
    expected = torch.nn.functional.cross_entropy(logits, x0[0, -20:], reduction="sum")
    (drows,) = torch.autograd.grad(expected, rows)
    torch.testing.assert_close(loss.float(), expected.detach(), rtol=1e-2, atol=0)
    assert relative(dhidden[0, -21:-1], drows) < 1e-2
    assert not dhidden[0, -1].any()
    dlogits = torch.softmax(logits.detach(), dim=1) - torch.nn.functional.one_hot(x0[0, -20:], V)
    assert relative(dweight[-4096:], dlogits.T[-4096:] @ rows.detach()) < 1e-2


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())
