# SPDX-License-Identifier: Apache-2.0
"""The nn.Modules: the functions with fixed options, no state, and a training step that goes through all of them."""

from typing import Any

import pytest
import torch
from comparison import assert_all_equal
from torch import Tensor, nn

from diffullama_ext import AttentionMask, attention, linear_shifted_cross_entropy, mask_tokens, shifted_cross_entropy
from diffullama_ext.modules import LinearShiftedCrossEntropy, MaskedAttention, MaskTokens, ShiftedCrossEntropy

pytestmark = pytest.mark.op("linear_shifted_cross_entropy")

LOSS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"shift": False, "normalizer": "sequence"},
    {"normalizer": "masked", "reduction": "none"},
]
LINEAR_OPTIONS: list[dict[str, Any]] = [*LOSS_OPTIONS, {"label_smoothing": 0.1, "softcap": 5.0, "chunk_rows": 3}]


def test_modules_have_no_state() -> None:
    for module in (MaskTokens(3), MaskedAttention(), ShiftedCrossEntropy(), LinearShiftedCrossEntropy()):
        assert not list(module.parameters())
        assert not module.state_dict()


def test_mask_tokens(impl: str, device: str) -> None:
    x0, p_mask = torch.randint(0, 9, (3, 20), device=device), torch.rand(3, device=device)
    maskable, index = torch.rand(3, 20, device=device) < 0.5, torch.tensor([5, 1, 2], device=device)
    got = MaskTokens(8)(x0, p_mask, maskable, seed=4, sample_index=index)
    expected = mask_tokens(x0, p_mask, mask_id=8, maskable=maskable, seed=4, sample_index=index, impl=impl)
    assert_all_equal(got, expected)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_masked_attention(impl: str, device: str, scale: float | None) -> None:
    q, k, v = (torch.randn(2, h, 9, 8, device=device) for h in (4, 2, 2))
    mask = AttentionMask.annealed(9, 0.5, seed=1, device=device)
    key_padding = torch.arange(9, device=device).expand(2, 9) < 7
    got = MaskedAttention(scale)(q, k, v, mask, key_padding)
    expected = attention(q, k, v, mask, scale=scale, key_padding=key_padding, impl=impl)
    assert isinstance(expected, Tensor)
    assert_all_equal([got], [expected])


def _targets(device: str) -> tuple[Tensor, ...]:
    """x0, masked, loss_weight, maskable."""
    masked = torch.rand(2, 9, device=device) < 0.5
    maskable = masked | (torch.rand(2, 9, device=device) < 0.5)
    return torch.randint(0, 12, (2, 9), device=device), masked, torch.rand(2, device=device), maskable


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_shifted_cross_entropy(impl: str, device: str, options: dict[str, Any]) -> None:
    logits = torch.randn(2, 9, 12, device=device)
    x0, masked, weight, maskable = _targets(device)
    loss, stats = ShiftedCrossEntropy(**options)(logits, x0, masked, weight, maskable)
    expected, expected_stats = shifted_cross_entropy(
        logits, x0, masked, loss_weight=weight, maskable=maskable, impl=impl, **options
    )
    assert_all_equal([loss, *stats], [expected, *expected_stats])


@pytest.mark.parametrize("options", LINEAR_OPTIONS, ids=str)
def test_linear_shifted_cross_entropy(impl: str, device: str, options: dict[str, Any]) -> None:
    hidden, head, bias = (torch.randn(shape, device=device) for shape in ((2, 9, 6), (12, 6), (12,)))
    x0, masked, weight, maskable = _targets(device)
    loss, stats = LinearShiftedCrossEntropy(**options)(hidden, head, x0, masked, weight, maskable, bias)
    expected, expected_stats = linear_shifted_cross_entropy(
        hidden, head, x0, masked, loss_weight=weight, bias=bias, maskable=maskable, impl=impl, **options
    )
    assert_all_equal([loss, *stats], [expected, *expected_stats])


class _OneLayer(nn.Module):
    """Embedding, one attention layer, a tied head: enough to train through every module."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mask_tokens, self.attention = MaskTokens(vocab - 1), MaskedAttention()
        self.loss = LinearShiftedCrossEntropy()

    def forward(self, x0: Tensor, t: Tensor, ratio: float, step: int) -> Tensor:
        noised = self.mask_tokens(x0, t, seed=step)
        x = self.embedding(noised.xt)
        q, k, v = (y[:, None] for y in self.qkv(x).chunk(3, dim=-1))
        mask = AttentionMask.annealed(x0.shape[1], ratio, seed=0, step=step, device=x0.device)
        hidden = x + self.attention(q, k, v, mask)[:, 0]
        loss, _ = self.loss(hidden, self.embedding.weight, x0, noised.masked, 1 / t)
        return loss


def test_modules_train_together(impl: str, device: str) -> None:
    """Sixty annealed steps on one repeated sequence learn it: gradients reach every parameter, and the loss falls."""
    torch.manual_seed(1)
    model = _OneLayer(vocab=12, width=16).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    x0 = (torch.arange(24, device=device) % 5).expand(8, 24)
    losses = []
    for step in range(60):
        t = torch.full((8,), 0.15 + 0.01 * (step % 60), device=device)
        loss = model(x0, t, min(1.0, (step + 1) / 30), step)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
