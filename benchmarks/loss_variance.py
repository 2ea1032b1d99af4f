# SPDX-License-Identifier: Apache-2.0
"""How much of the gradient is noise, by the way that levels and masks are drawn, at equal forwards of the model.

    python benchmarks/loss_variance.py

A model of two layers, adapted and trained for a moment, on fixed data; its gradient under many draws of the noise.
Printed is E|g - E g|^2 over that of independent draws, with the standard error over the draws: below 1 is better. Every
draw costs one forward of BATCH sequences: with two views of a sample it is half of the data, each half in turn, and E
is over the same half, so that only the noise counts and not which samples are in the batch.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from diffullama_ext.integrations import adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig

VOCAB, BATCH, LENGTH, DRAWS = 64, 16, 32, 400
WAYS: dict[str, dict[str, Any]] = {
    "independent": {},
    "strata = batch": {"strata": BATCH},
    "antithetic": {"antithetic": True},
    "exact count": {"exact_count": True},
    "exact count, strata": {"exact_count": True, "strata": BATCH},
    "complementary": {"views": "complementary"},
    "complementary, exact, strata": {"views": "complementary", "exact_count": True, "strata": BATCH // 2},
    "nested": {"views": "nested"},
}


def text() -> Tensor:
    """[BATCH, LENGTH] tokens of a noisy cycle, so that context tells something."""
    generator = torch.Generator().manual_seed(0)
    cycle = torch.randint(VOCAB - 1, (BATCH, 1), generator=generator) + torch.arange(LENGTH)
    other = torch.rand(BATCH, LENGTH, generator=generator) < 0.3
    return torch.where(other, torch.randint(VOCAB - 1, (BATCH, LENGTH), generator=generator), cycle % (VOCAB - 1))


def trained(x0: Tensor) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = adapt(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCAB, **shape)), mask_token=VOCAB - 1)
    optimizer, objective = (
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        DiffusionObjective(ObjectiveConfig(VOCAB - 1)),
    )
    for step in range(100):
        objective(model, x0, seed=1, sample_index=BATCH * step + torch.arange(BATCH)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def gradients(model: PreTrainedModel, x0: Tensor, way: dict[str, Any]) -> Tensor:
    """[DRAWS, parameters]; with two views half of the batch, so that every draw costs the same forward."""
    objective = DiffusionObjective(ObjectiveConfig(VOCAB - 1, **way))
    n = BATCH // objective.config.n_views
    rows = []
    for draw in range(DRAWS):
        part = x0[:n] if n == BATCH or draw % 2 == 0 else x0[n:]  # each half in turn: the mean is that of the whole
        model.zero_grad()
        objective(model, part, seed=2, sample_index=n * draw + torch.arange(n)).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


def spread(rows: Tensor, parts: int) -> Tensor:
    """[DRAWS] |g - E g|^2, E over the draws of the same part of the batch."""
    centred = [rows[part::parts] - rows[part::parts].mean(dim=0) for part in range(parts)]
    return torch.cat([(part**2).sum(dim=1) * len(part) / (len(part) - 1) for part in centred])


def main() -> None:
    x0 = text()
    model = trained(x0)
    base = None
    for name, way in WAYS.items():
        parts = 2 if way.get("views") else 1
        value = spread(gradients(model, x0, way), parts)
        base = value.mean() if base is None else base
        error = value.std() / base / DRAWS**0.5
        print(f"{name:30} {value.mean() / base:6.2f} +- {error:.2f}")


if __name__ == "__main__":
    main()
