# SPDX-License-Identifier: Apache-2.0
"""A language whose every masked token has a known distribution is learned by every kind of objective.

The language is a Markov chain over K words: the next word of a cycle with probability 1 - SLIP, else another,
uniformly; the first word is given. What a model can know of a noised token is its posterior given all that the model
reads, which the forward-backward algorithm computes exactly. No model is better than that on average, and one that has
learned nothing but the words costs log K a token.

Two bars, none of them from a result; the length of the training is set to meet them. A model must have learned 85 % of
what lies between log K and the posterior. And it must be better than the posterior given only what stands before a
token, which is the best that causal attention can do. The other side, that none beats the posterior, leaves 0.03 nats
for chance: with n > 700 scored tokens and a divergence d < 0.15 the mean of a log-ratio has a standard error below
sqrt(2 d / n) = 0.02.
"""

import math
from typing import Any

import pytest
import torch
from objective_cases import adapted, objective
from tiny_models import MASK_ID
from torch import Tensor

from diffullama_ext.objective import ObjectiveConfig

KINDS: dict[str, dict[str, Any]] = {
    "elbo": {"strata": 16},
    "no shift": {"shift": False, "antithetic": True},
    "cart": {"loss_weight": "cart"},
    "complementary": {"views": "complementary", "exact_count": True},
    # One level: the posterior depends on it, and the model is not told.
    "mix": {"noise": "mix", "vocab_size": 20, "loss_weight": "uniform", "t_min": 0.49, "t_max": 0.5},
    "blocks": {"block_length": 4, "block_length_start": 2, "block_length_steps": 30},
}
LENGTH, WORDS, FIRST, SLIP, LEARNED = 8, 4, 8, 0.1, 0.85
STEPS, BATCH, HELDOUT = 250, 128, 256


def sentences(n: int, seed: int) -> Tensor:
    """[n, LENGTH] ids FIRST ... FIRST + WORDS - 1 of the chain."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.rand((n, LENGTH), generator=generator)
    other = torch.randint(2, WORDS + 1, (n, LENGTH), generator=generator)  # any but one further
    steps = torch.where(moves < SLIP, other, torch.ones_like(other))
    x0 = FIRST + steps.cumsum(dim=1) % WORDS
    assert not (x0 == MASK_ID).any()
    return x0


def chain() -> Tensor:
    """[K, K] float64 P(next | word), from the definition."""
    table = torch.full((WORDS, WORDS), SLIP / (WORDS - 1), dtype=torch.float64)
    for word in range(WORDS):
        table[word, (word + 1) % WORDS] = 1 - SLIP
    return table


def posterior(evidence: Tensor, place: int) -> Tensor:
    """[N, K] P(word at ``place`` | all) by the forward-backward algorithm; evidence [N, L, K] = P(seen | word)."""
    table = chain()
    forward = evidence[:, 0] / WORDS
    for j in range(1, place + 1):
        forward = (forward @ table) * evidence[:, j]
        forward = forward / forward.sum(dim=1, keepdim=True)
    backward = torch.ones_like(forward)
    for j in range(evidence.shape[1] - 1, place, -1):
        backward = (backward * evidence[:, j]) @ table.T
        backward = backward / backward.sum(dim=1, keepdim=True)
    both = forward * backward
    return both / both.sum(dim=1, keepdim=True)


def evidence_of(config: ObjectiveConfig, xt: Tensor, t: Tensor) -> Tensor:
    """[N, L, K] P(xt | word): nothing in a mask; certainty in a word, or what mixed noise at t [N] leaves of it."""
    same = (xt[..., None] == FIRST + torch.arange(WORDS)).double()
    if config.noise == "mix":
        assert config.vocab_size is not None
        phi = (t.double() * math.pi / 2)[:, None, None]
        at_random = (phi.sin() + phi.cos() - 1) / (config.vocab_size - 1)
        same = (1 - phi.sin()) * same + at_random
    return torch.where((xt == MASK_ID)[..., None], 1.0, same)


def least_nll(
    config: ObjectiveConfig, x0: Tensor, xt: Tensor, scored: Tensor, t: Tensor, *, leftward: bool = False
) -> float:
    """The mean negative log-likelihood of the scored tokens under their posterior given what the model reads.

    ``leftward``: of that, only what stands before the token.
    """
    clean, noised = evidence_of(ObjectiveConfig(MASK_ID), x0, t), evidence_of(config, xt, t)
    noised[:, 0] = clean[:, 0]  # given
    total = 0.0
    for j in range(LENGTH):
        reads = noised.clone()
        if config.block_length is not None:
            start = j // config.block_length * config.block_length
            end = start if config.shift and j == start else start + config.block_length
            reads[:, :start], reads[:, end:] = clean[:, :start], 1.0
        if leftward:
            reads[:, j:] = 1.0
        words = posterior(reads, j)
        # A token is scored only where it is not what is seen.
        words = torch.where(xt[:, j, None] == FIRST + torch.arange(WORDS), 0.0, words)
        words = words / words.sum(dim=1, keepdim=True)
        total -= words.gather(1, x0[:, j, None] - FIRST).log()[scored[:, j]].sum().item()
    return total / int(scored.sum())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_language_is_learned(kind: dict[str, Any]) -> None:
    model, goal = adapted(initializer_range=0.1).train(), objective(**kind)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS, pct_start=0.15, cycle_momentum=False)
    given = (torch.arange(LENGTH) > 0).expand(max(BATCH, HELDOUT), -1)
    for step in range(STEPS):
        number = BATCH * step + torch.arange(BATCH)
        out = goal(model, sentences(BATCH, step), maskable=given[:BATCH], seed=1, step=step, sample_index=number)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    held, draw = sentences(HELDOUT, 10**6), {"maskable": given[:HELDOUT], "seed": 2, "step": STEPS}
    with torch.no_grad():
        stats = goal(model.eval(), held, **draw).stats
    batch = goal.noise(held, **draw)
    assert int(batch.scored.sum()) > 700
    read = (goal.config, batch.x0, batch.xt, batch.scored, batch.t)
    least, causal = least_nll(*read), least_nll(*read, leftward=True)
    excess = (stats.nll_sum / stats.n_scored).item() - least
    assert -0.03 < excess < (1 - LEARNED) * (math.log(WORDS) - least), f"{excess:.3f} nats above {least:.3f}"
    assert excess < causal - least, f"{excess:.3f} nats above {least:.3f}, of a causal model at least {causal:.3f}"
