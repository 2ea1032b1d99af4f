# SPDX-License-Identifier: Apache-2.0
"""The demo model's training step (GPT-2, 3 layers, width 160, V 2048, B 32, L 64) beside the same in eager PyTorch.

    python -m benchmarks.bench_training_step

Both start from the same weights (benchmarks/training_step.py). Steps alternate, so that a busy machine slows both;
medians are compared.
"""

import argparse
import copy
import statistics

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.training_step import own_loss, plain_loss, timed_step
from diffullama_ext.integrations import adapt

VOCAB, LENGTH, BATCH, MASK_ID = 2048, 64, 32, 2047


def main(steps: int = 40) -> float:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=160, n_layer=3, n_head=5, resid_pdrop=0.0)
    config.embd_pdrop = config.attn_pdrop = 0.0
    config.bos_token_id = config.eos_token_id = MASK_ID
    config.activation_function = "gelu_pytorch_tanh"
    plain = GPT2LMHeadModel(config)
    own = adapt(copy.deepcopy(plain), mask_token=MASK_ID)
    plain.set_attn_implementation("sdpa")
    loops = {"eager": (plain, plain_loss(MASK_ID)), "diffullama_ext": (own, own_loss(MASK_ID, BATCH))}
    optimisers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for name, (model, _) in loops.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(steps):
        x0 = torch.randint(VOCAB - 1, (BATCH, LENGTH))
        for name, (model, loss) in loops.items():
            seconds[name].append(timed_step(model.train(), optimisers[name], loss, x0, step))
    medians = {name: statistics.median(times[5:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {1000 * median:.1f} ms a step, {BATCH * LENGTH / median:,.0f} tokens/s")
    print(f"ratio {medians['eager'] / medians['diffullama_ext']:.2f}, {torch.get_num_threads()} threads")
    return medians["eager"] / medians["diffullama_ext"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The demo model's training step beside the same in eager PyTorch.")
    parser.add_argument("steps", nargs="?", type=int, default=40)
    main(parser.parse_args().steps)
