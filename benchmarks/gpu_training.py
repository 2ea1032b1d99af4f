# SPDX-License-Identifier: Apache-2.0
"""Training steps of GPT-2 small and LLaMA-1.1B on one GPU, random bfloat16 weights, beside plain PyTorch in one run.

    python -m benchmarks.gpu_training [out.json]

Each step is whole (loss, backward, clipping, fused AdamW) and waits for the device. Models follow one another, so that
the peak of memory is each one's own: weights, gradients, optimiser and activations.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.training_step import Loss, own_loss, plain_loss, timed_step
from diffullama_ext.integrations import adapt

OURS, PLAIN = "diffullama_ext", "plain PyTorch"
WARM, TIMED = 3, 10


def gpt2_small() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def llama_1b() -> Any:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=32_000, max_position_embeddings=2048)
    )


@dataclass(frozen=True)
class Row:
    """A model and its batch; goals as ratios to the plain path: at least so much faster, at most so much memory."""

    name: str
    build: Callable[[], Any]
    batch: int
    length: int
    mask_id: int
    faster: float
    memory: float


ROWS = (
    Row("GPT-2 small", gpt2_small, 64, 512, 50_256, faster=2.0, memory=0.5),
    Row("LLaMA-1.1B", llama_1b, 8, 2048, 811, faster=1.45, memory=0.6),
)


def measure(row: Row, contender: str, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step, tokens a second, and bytes at the peak (None on the CPU)."""
    torch.manual_seed(0)
    model = row.build().to(device=device, dtype=torch.bfloat16).train()
    loss: Loss
    if contender == OURS:
        model, loss = adapt(model, mask_token=row.mask_id), own_loss(row.mask_id, row.batch)
    else:
        model.set_attn_implementation("sdpa")
        loss = plain_loss(row.mask_id)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds = []
    for step in range(WARM + TIMED):
        if step == WARM and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        x0 = torch.randint(row.mask_id, (row.batch, row.length), device=device)
        seconds.append(timed_step(model, optimiser, loss, x0, step))
    median = statistics.median(seconds[WARM:])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"median_s": median, "tokens_per_s": row.batch * row.length / median, "peak_bytes": peak}


def compare(row: Row, device: torch.device) -> dict[str, Any]:
    """Both contenders, their ratios, and which goals are missed."""
    record: dict[str, Any] = {"model": row.name, "batch": row.batch, "length": row.length}
    for contender in (PLAIN, OURS):
        record[contender] = measure(row, contender, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    faster = record[PLAIN]["median_s"] / record[OURS]["median_s"]
    missed = [] if faster >= row.faster else [f"{faster:.2f}x, goal {row.faster:g}x"]
    record["faster"], record["memory"] = faster, None
    if device.type == "cuda":
        record["memory"] = record[OURS]["peak_bytes"] / record[PLAIN]["peak_bytes"]
        if record["memory"] > row.memory:
            missed.append(f"{record['memory']:.0%} of the memory, goal {row.memory:.0%}")
    return record | {"missed": missed}


def main(out: Path | None = None) -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_training needs a CUDA device, torch finds none")
    records = [compare(row, torch.device("cuda")) for row in ROWS]
    print(json.dumps(records, indent=1))
    if out is not None:
        out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
