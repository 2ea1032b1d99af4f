# SPDX-License-Identifier: Apache-2.0
"""`diffullama adapt`: an autoregressive model becomes a masked diffusion model by training on the user's text."""

from __future__ import annotations

import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Report, pick_device, quiet_libraries, reporting, scores_table
from .errors import BadInput, checking_input
from .models import load_autoregressive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..evaluation import DiffusionScores, Estimate

HELDOUT_BLOCKS = 128  # at most so many are scored on, before and after

Scores = tuple["Estimate", "DiffusionScores"]


def adapt(
    model: Annotated[str, typer.Option("--model", help="Causal language model: a folder, or an id of the Hub.")],
    data: Annotated[Path, typer.Option(help="Text, .jsonl, .parquet, or a folder of these.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapted model: new or empty.")],
    column: Annotated[str, typer.Option(help="Column of the text in .jsonl and .parquet.")] = "text",
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a block; default 512 or the model's limit.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks a forward.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Forwards a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak, after 5 % of the steps; then a cosine.")] = 1e-4,
    anneal_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps from causal to bidirectional attention; default a third.")
    ] = None,
    shift: Annotated[bool, typer.Option(help="Row i of the logits predicts token i+1, as before.")] = True,
    mask_token: Annotated[str | None, typer.Option(help="Its text; by default the tokenizer's, or a new one.")] = None,
    heldout: Annotated[float, typer.Option(help="Share of the blocks that is held out and scored on.")] = 0.05,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast; the weights stay float32.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of order and noise.")] = 0,
) -> None:
    """Adapt a causal language model to masked diffusion.

    OUT gets the model in its own architecture (plain transformers loads it), the tokenizer and metrics.json: held-out
    figures before and after, with the same noise. For more than one GPU, checkpoints and resuming use
    diffullama_ext.training.DiffusionTrainer.
    """
    from ..data import split_blocks
    from ..output_folder import is_free, written_at_once

    with checking_input():
        where = pick_device(device)
        if not is_free(out):
            raise BadInput(f"{out} is not empty; give another --out")
        anneal_steps = steps // 3 if anneal_steps is None else anneal_steps
        if anneal_steps > steps:
            raise BadInput(f"--anneal-steps must be at most --steps, got {anneal_steps} and {steps}")
        loaded, tokenizer, blocks = _model_and_blocks(model, data, column, length)
        train, held = split_blocks(blocks, heldout)
        held = held[:HELDOUT_BLOCKS]
        from ..integrations import adapt as adapt_model

        adapt_model(loaded, tokenizer, mask_token=mask_token, shift=shift, anneal_steps=anneal_steps)
    loaded.to(where)
    options = {"learning_rate": learning_rate, "bf16": bf16, "seed": seed, "max_steps": steps}
    options |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate}
    with reporting() as report:
        before = _scores(loaded, held, batch_size, "evaluate before", report)
        _train(loaded, tokenizer, train, where, options, report)
        after = _scores(loaded, held, batch_size, "evaluate after", report)
    rows = {"as it was": before, "adapted": after}
    metrics = {
        "kind": "diffullama adapt",
        "model": model,
        "data": str(data),
        "tokens": {"train": train.numel(), "heldout": held.numel()},
        "length": blocks.shape[1],
        "anneal_steps": anneal_steps,
        **options,
        "models": {name: {"ar_loss": ar.to_dict(), **scores.to_dict()} for name, (ar, scores) in rows.items()},
    }
    with written_at_once(out) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text = json.dumps(metrics, indent=2, allow_nan=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    _show(rows, held, out)


def _model_and_blocks(model: str, data: Path, column: str, length: int | None) -> tuple[Any, Any, Tensor]:
    """The model and its tokenizer, and the data as blocks that fit it."""
    quiet_libraries()
    from ..data import pack, read_texts

    texts = read_texts(data, column=column)
    first = next(texts)  # wrong data shows before a large model is loaded
    loaded, tokenizer = load_autoregressive(model)
    limit = getattr(loaded.config, "max_position_embeddings", None) or 512
    length = min(512, limit) if length is None else length
    if length > limit:
        raise BadInput(f"--length must be at most the model's {limit} positions, got {length}")
    return loaded, tokenizer, pack(chain([first], texts), tokenizer, length)


def _scores(model: Any, held: Tensor, batch_size: int, stage: str, report: Report) -> Scores:
    from ..evaluation import EvaluationConfig, autoregressive_loss, diffusion_scores
    from ..integrations import DiffusionConfig

    config = DiffusionConfig.of(model)
    return (
        autoregressive_loss(model, held, batch_size=batch_size),
        diffusion_scores(
            model,
            held,
            EvaluationConfig(batch_size=batch_size),
            mask_id=config.mask_id,
            shift=config.shift,
            progress=lambda done, total: report(stage, done, total, ""),
        ),
    )


def _train(
    model: Any,
    tokenizer: Any,
    train: Tensor,
    device: torch.device,
    options: dict[str, Any],
    report: Report,
) -> None:
    from transformers import TrainerCallback, TrainingArguments

    from ..data import TokenBlocks
    from ..training import DiffusionTrainer

    class Progress(TrainerCallback):
        """Trainer's progress as ours."""

        loss = ""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = f"loss {logs['loss']:.3f}" if logs and "loss" in logs else self.loss

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report("adapt", state.global_step, state.max_steps, self.loss)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options["max_steps"] // 20),
            logging_steps=max(1, options["max_steps"] // 100),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            **options,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs the first; Trainer would use DataParallel
        trainer = DiffusionTrainer(
            model, arguments, train_dataset=TokenBlocks(train), processing_class=tokenizer, callbacks=[Progress()]
        )
        trainer.train()


def _show(rows: dict[str, Scores], held: Tensor, out: Path) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    title = f"Held-out text: {held.numel()} tokens in {len(held)} blocks, nats ± standard error, one noise for both"
    console.print(scores_table(title, rows))
    difference = rows["adapted"][1].diffusion_loss - rows["as it was"][1].diffusion_loss
    console.print(f"ELBO/token, adapted minus as it was: {difference}", markup=False)
    console.print(f"The adapted model is in {out}", markup=False)
