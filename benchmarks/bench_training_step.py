# SPDX-License-Identifier: Apache-2.0
"""The demo model's training step (GPT-2, 3 layers, width 160, V 2048, B 32, L 64) beside the same in eager PyTorch.

    python -m benchmarks.bench_training_step

Both start from the same weights and see the same noise; the eager step makes an additive mask [1, 1, L, L], all logits
[B, L, V] and F.cross_entropy. Steps alternate, so that a busy machine slows both alike; medians are compared.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from diffullama_ext.integrations import adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig, draw_t

VOCAB, LENGTH, BATCH, MASK_ID = 2048, 64, 32, 2047


def eager_loss(model: Any, x0: torch.Tensor, step: int) -> torch.Tensor:
    number = step * BATCH + torch.arange(BATCH)
    t = draw_t(number, 0, strata=BATCH)
    masked = torch.rand(x0.shape) < t[:, None]
    xt = torch.where(masked, MASK_ID, x0)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() | (torch.rand(LENGTH, LENGTH) < 0.5)
    bias = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~visible, torch.finfo(torch.float32).min)
    logits = model(xt, attention_mask=bias.expand(BATCH, 1, LENGTH, LENGTH), use_cache=False).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), x0[:, 1:].flatten(), reduction="none").view(BATCH, -1)
    return (nll * masked[:, 1:] / t[:, None]).sum() / (BATCH * (LENGTH - 1))


def own_loss(objective: DiffusionObjective) -> Callable:
    def loss(model: Any, x0: torch.Tensor, step: int) -> torch.Tensor:
        number = step * BATCH + torch.arange(BATCH)
        return objective(model, x0, attn_mask_ratio=0.5, seed=0, step=step, sample_index=number).loss

    return loss


def main(steps: int = 40) -> float:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=160, n_layer=3, n_head=5, resid_pdrop=0.0)
    config.embd_pdrop = config.attn_pdrop = 0.0
    config.activation_function = "gelu_pytorch_tanh"
    plain = GPT2LMHeadModel(config)
    own = adapt(copy.deepcopy(plain), mask_token=MASK_ID)
    plain.set_attn_implementation("sdpa")
    objective = DiffusionObjective(ObjectiveConfig(MASK_ID, strata=BATCH))
    loops = {"eager": (plain, eager_loss), "diffullama_ext": (own, own_loss(objective))}
    optimisers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for name, (model, _) in loops.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(steps):
        x0 = torch.randint(VOCAB - 1, (BATCH, LENGTH))
        for name, (model, loss_of) in loops.items():
            start = time.perf_counter()
            optimisers[name].zero_grad()
            loss_of(model.train(), x0, step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimisers[name].step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[5:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {1000 * median:.1f} ms a step, {BATCH * LENGTH / median:,.0f} tokens/s")
    print(f"ratio {medians['eager'] / medians['diffullama_ext']:.2f}, {torch.get_num_threads()} threads")
    return medians["eager"] / medians["diffullama_ext"]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
