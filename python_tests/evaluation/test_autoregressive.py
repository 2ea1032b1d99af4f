# SPDX-License-Identifier: Apache-2.0
"""The left-to-right loss against transformers' own."""

import pytest
import torch
from tiny_models import FAMILIES, MASK_ID, VOCAB, causal_lm

from diffullama_ext.evaluation import autoregressive_loss
from diffullama_ext.integrations import adapt


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(8, VOCAB, (5, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_loss_before_and_after_adapting(family, blocks):
    model = causal_lm(family)
    with torch.no_grad():
        logits = model(input_ids=blocks).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
    assert autoregressive_loss(model, blocks, batch_size=2).mean == pytest.approx(expected, rel=1e-5)
    adapt(model, mask_token=MASK_ID)
    assert autoregressive_loss(model, blocks.int(), batch_size=3).mean == pytest.approx(expected, rel=1e-5)


def test_standard_error_is_over_sequences(blocks):
    model = causal_lm("gpt2")
    alone = torch.tensor([autoregressive_loss(model, block[None]).mean for block in blocks])
    estimate = autoregressive_loss(model, blocks)
    assert estimate.mean == pytest.approx(alone.mean().item(), rel=1e-5)
    assert estimate.stderr == pytest.approx((alone.std() / 5**0.5).item(), rel=1e-4)


def test_reports_progress_and_puts_the_mode_back(blocks):
    seen = []
    model = causal_lm("gpt2").train()
    autoregressive_loss(model, blocks, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert model.training


def test_rejects_blocks_without_a_target():
    with pytest.raises(ValueError, match=r"blocks must be at least \[1, 2\], got \[3, 1\]"):
        autoregressive_loss(causal_lm("gpt2"), torch.zeros(3, 1, dtype=torch.int64))
