# SPDX-License-Identifier: Apache-2.0
"""A loop on accelerate: the objective takes the wrapped model, and the denominator is counted over all processes.

accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from diffullama_ext.integrations import adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig
from diffullama_ext.schedules import AttentionAnnealing

MASK_ID, LENGTH, SEED = 64, 32, 0


def main(steps: int = 40, batch: int = 16, anneal_steps: int = 10) -> list[float]:
    accelerator = Accelerator()
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=MASK_ID + 1, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = adapt(GPT2LMHeadModel(config), mask_token=MASK_ID)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    objective, annealing, losses = DiffusionObjective(ObjectiveConfig(MASK_ID)), AttentionAnnealing(anneal_steps), []
    rank, count = accelerator.process_index, accelerator.num_processes
    for step in range(steps):
        number = torch.arange(step * batch, (step + 1) * batch).chunk(count)[rank]  # of the whole run: noise by number
        x0 = (number[:, None] % MASK_ID).expand(-1, LENGTH).contiguous().to(accelerator.device)
        noise = {"seed": SEED, "step": step, "sample_index": number.to(accelerator.device)}
        total = accelerator.reduce(objective.denominator(x0, **noise))
        out = objective(model, x0, attn_mask_ratio=annealing(step), **noise)
        optimizer.zero_grad()
        accelerator.backward(out.stats.weighted_sum / total * count)  # gradients are averaged over processes
        optimizer.step()
        sums = accelerator.reduce(torch.stack([out.stats.nll_sum.detach(), out.stats.n_scored.float()]))
        losses.append((sums[0] / sums[1]).item())
    model, optimizer = accelerator.free_memory(model, optimizer)  # before the process group: docs/training.md
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    print([round(loss, 2) for loss in main()])
