# SPDX-License-Identifier: Apache-2.0
"""What the loss allocates, counted from the allocator's own events, grows with the tokens but never by V a token."""

import functools
from collections.abc import Callable

import pytest
import torch
from allocations import peak_bytes
from objective_cases import SEED, adapted
from tiny_models import MASK_ID

from diffullama_ext import linear_shifted_cross_entropy
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig, distillation, loss

VOCAB, WIDTH = 4099, 32


def loss_alone(n_tokens: int, chunk_rows: int) -> Callable[[], None]:
    hidden = torch.randn(1, n_tokens, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    x0, masked = torch.randint(VOCAB, (1, n_tokens)), torch.ones(1, n_tokens, dtype=torch.bool)

    def work() -> None:
        hidden.grad = weight.grad = None
        linear_shifted_cross_entropy(hidden, weight, x0, masked, chunk_rows=chunk_rows)[0].backward()

    return work


def test_the_counter_sees_dense_logits() -> None:
    def dense(n_tokens: int) -> Callable[[], None]:
        hidden, weight = torch.randn(n_tokens, WIDTH), torch.randn(VOCAB, WIDTH)
        return lambda: torch.nn.functional.linear(hidden, weight).logsumexp(dim=1).sum()

    growth = peak_bytes(dense(256)) - peak_bytes(dense(64))
    assert growth >= 192 * VOCAB * 4


@pytest.mark.ext
def test_the_loss_grows_by_hidden_states_not_by_logits() -> None:
    few, many = (peak_bytes(loss_alone(n, 16)) for n in (128, 1024))
    assert few >= 16 * VOCAB * 4, "one chunk of logits"
    assert many - few < 896 * (8 * WIDTH * 4), "a few rows of hidden states a token"
    assert many - few < 896 * VOCAB * 4 / 10


@pytest.mark.ext
@pytest.mark.parametrize(
    "variant", [{}, {"views": "complementary"}, {"block_length": 8}, {"distill_weight": 0.5}], ids=str
)
def test_the_objective_never_holds_the_logits(variant: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens need far less more than their logits would."""
    chunks_of_16 = functools.partial(linear_shifted_cross_entropy, chunk_rows=16)
    monkeypatch.setattr(loss, "linear_shifted_cross_entropy", chunks_of_16)
    monkeypatch.setattr(distillation, "LOGITS_ALIVE", 16 * VOCAB)
    model = adapted(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    teacher = model if variant.get("distill_weight") else None
    goal = DiffusionObjective(ObjectiveConfig(MASK_ID, **variant), teacher)

    def step(batch: int) -> Callable[[], None]:
        x0, views = torch.randint(VOCAB, (batch, 64)), goal.config.n_views
        t = torch.full((batch, 8) if goal.config.block_length else (batch,), 0.9 if views == 1 else 0.5)

        def work() -> None:
            model.zero_grad()
            goal(model, x0, seed=SEED, t=t).loss.backward()

        return work

    growth = peak_bytes(step(24)) - peak_bytes(step(12))
    assert growth < 12 * 64 * VOCAB * 4 / 4
