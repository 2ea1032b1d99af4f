# SPDX-License-Identifier: Apache-2.0
"""What the tests of the objective share: one batch, one call, one tiny model."""

from typing import Any

import torch
from tiny_models import MASK_ID, VOCAB, causal_lm
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffullama_ext import AttentionMask
from diffullama_ext.integrations import adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig

BATCH, LENGTH, SEED, STEP, RATIO = 4, 12, 11, 3, 0.4
CALL: dict[str, Any] = {"seed": SEED, "step": STEP, "attn_mask_ratio": RATIO}


def tokens(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (batch, length))  # among them some that are MASK_ID


def adapted(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    return adapt(causal_lm(family, **overrides), mask_token=MASK_ID)


def objective(**config: Any) -> DiffusionObjective:
    return DiffusionObjective(ObjectiveConfig(MASK_ID, **config))


def full_logits(model: PreTrainedModel, xt: Tensor, ratio: float = RATIO, **inputs: Tensor) -> Tensor:
    mask = AttentionMask.annealed(xt.shape[1], ratio, seed=SEED, step=STEP)
    return model(xt, diffusion_mask=mask, **inputs).logits


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same_gradients(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0.0 if b is None else 1e-5 * b.abs().max().item())
