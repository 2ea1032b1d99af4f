# SPDX-License-Identifier: Apache-2.0
"""One adaptation in a folder: it starts, goes on after it was cut off, and ends with a model."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output_folder import is_free, write_file_at_once
from .console import Report, pick_device, quiet_libraries, reporting, scores_table
from .errors import BadInput, checking_input
from .models import load_autoregressive

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapt_config import AdaptConfig
    from ..evaluation import DiffusionScores, Estimate

SETTINGS, ENVIRONMENT, CURVES, METRICS = "run.yaml", "environment.json", "curves.json", "metrics.json"
HELDOUT_BLOCKS = 128  # at most so many are scored on, before and after
PACKAGES = ("diffullama-ext", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "numpy")

Scores = tuple["Estimate", "DiffusionScores"]


def run_adaptation(config: AdaptConfig, out: Path, processes: int = 1) -> None:
    """Train, score and save; errors as of the command line."""
    import torch

    from ..integrations import adapt, add_lora
    from ..training.checkpoints import checkpoints

    with checking_input():
        where = pick_device(config.device)
        _check_folder(config, out)
        loaded, tokenizer, train, held = _model_and_blocks(config)
        steps = config.annealing_steps()
        adapt(loaded, tokenizer, mask_token=config.mask_token_or_id(), shift=config.shift, anneal_steps=steps)
        arguments = config.training_arguments(
            out, processes=processes, use_cpu=where.type == "cpu", dataloader_pin_memory=where.type == "cuda"
        )
    model: Any = loaded.to(where)
    if config.lora_rank:
        torch.manual_seed(config.seed)  # its matrices begin at random
        model = add_lora(loaded, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)
    if arguments.process_index == 0:
        _start(config, out)
    with reporting() as report:
        curves = _Curves(out / CURVES, held, config.batch_size, report)
        trainer = _trainer(config, model, tokenizer, train, arguments, curves, report)
        # A model in parts cannot be scored by one process, nor have its adapter merged.
        in_parts = _is_in_parts(trainer)
        scores = arguments.process_index == 0 and not in_parts
        if scores and not checkpoints(out):
            curves.score(loaded, 0)
        trainer.train(resume_from_checkpoint=bool(checkpoints(out)))
        if config.lora_rank and not in_parts:
            loaded = model.merge_and_unload()
        if scores:
            curves.score(loaded, config.steps)
    if in_parts:
        trainer.save_model(str(out))
    elif scores:
        _finish(config, out, loaded, tokenizer, curves, len(train))


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_folder(config: AdaptConfig, out: Path) -> None:
    """BadInput where ``out`` holds anything but the beginning of this very run."""
    from ..adapt_config import AdaptConfig

    if is_free(out):
        return
    if not (out / SETTINGS).is_file():
        raise BadInput(f"{out} is not empty; give another --out")
    if (out / METRICS).is_file():
        raise BadInput(f"{out} is not empty: it holds a finished run; give another --out")
    begun = AdaptConfig.resolve(path=out / SETTINGS)
    changed = [name for name, value in vars(begun).items() if value != getattr(config, name)]
    if changed:
        values = ", ".join(f"{name} {getattr(begun, name)!r} not {getattr(config, name)!r}" for name in changed)
        raise BadInput(f"{out} holds a run with other settings: {values}; give another --out, or its own settings")


def _start(config: AdaptConfig, out: Path) -> None:
    """The record of what runs: settings with every default, and versions."""
    out.mkdir(parents=True, exist_ok=True)
    write_file_at_once(out / SETTINGS, config.to_yaml())
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    write_file_at_once(out / ENVIRONMENT, json.dumps(versions, indent=2) + "\n")


def _finish(config: AdaptConfig, out: Path, model: Any, tokenizer: Any, curves: _Curves, n_train: int) -> None:
    """The model's files appear with config.json, which makes the folder a model, as the last of them."""
    with tempfile.TemporaryDirectory(prefix=".model.", dir=out) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        for file in sorted(Path(staged).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(file, out / file.name)
    length = curves.held.shape[1]
    metrics = {
        "kind": "diffullama adapt",
        "model": config.model,
        "data": list(config.data),
        "tokens": {"train": n_train * length, "heldout": curves.held.numel()},
        "length": length,
        "anneal_steps": config.annealing_steps(),
        "max_steps": config.steps,
        "seed": config.seed,
        "models": {"as it was": curves.by_step["0"], "adapted": curves.by_step[str(config.steps)]},
    }
    write_file_at_once(out / METRICS, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    _show(curves, out)


# --- parts ------------------------------------------------------------------------------------------------------------


def _model_and_blocks(config: AdaptConfig) -> tuple[Any, Any, Any, Tensor]:
    """The model and its tokenizer; the data as training examples that fit it, and held-out blocks [N, L]."""
    quiet_libraries()
    import torch

    from ..data import DataSource, load_train_and_heldout

    weights = config.data_weight or (1.0,) * len(config.data)
    sources = [DataSource(path, w, config.column) for path, w in zip(config.data, weights, strict=True)]
    for source in sources:
        next(source.texts(streaming=True))  # wrong data shows before a large model is loaded
    loaded, tokenizer = load_autoregressive(config.model)
    limit = getattr(loaded.config, "max_position_embeddings", None) or 512
    length = min(512, limit) if config.length is None else config.length
    if length > limit:
        raise BadInput(f"--length must be at most the model's {limit} positions, got {length}")
    layout: dict[str, Any] = {"context": config.block_context(), "isolate_documents": config.isolate_documents}
    train, held = load_train_and_heldout(sources, tokenizer, length, heldout=config.heldout, **layout)
    rows = [held[row]["input_ids"] for row in range(min(len(held), HELDOUT_BLOCKS))]  # type: ignore[arg-type]
    return loaded, tokenizer, train, torch.stack(rows)


class _Curves:
    """Held-out figures by step, with the same noise at each, kept in a file for a run that goes on."""

    def __init__(self, path: Path, held: Tensor, batch_size: int, report: Report) -> None:
        self.path, self.held, self.batch_size, self.report = path, held, batch_size, report
        self.by_step: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.last: dict[str, Scores] = {}

    def score(self, model: Any, step: int) -> None:
        """At ``step``; random state stays as it was, so that training does not depend on it."""
        from ..evaluation import EvaluationConfig, autoregressive_loss, diffusion_scores
        from ..integrations import DiffusionConfig

        config = DiffusionConfig.of(model)
        stage = f"evaluate at step {step}"
        ar = autoregressive_loss(model, self.held, batch_size=self.batch_size)
        scores = diffusion_scores(
            model,
            self.held,
            EvaluationConfig(batch_size=self.batch_size),
            mask_id=config.mask_id,
            shift=config.shift,
            progress=lambda done, total: self.report(stage, done, total, ""),
        )
        self.last[str(step)] = (ar, scores)
        self.by_step[str(step)] = {"ar_loss": ar.to_dict(), **scores.to_dict()}
        write_file_at_once(self.path, json.dumps(self.by_step, indent=1, allow_nan=False) + "\n")


def _is_in_parts(trainer: Any) -> bool:
    return bool(trainer.is_sharded)


def _trainer(
    config: AdaptConfig, model: Any, tokenizer: Any, train: Any, arguments: Any, curves: _Curves, report: Report
) -> Any:
    from transformers import PrinterCallback, TrainerCallback

    from ..integrations import DiffusionConfig
    from ..training import DiffusionTrainer

    base = model.get_base_model() if config.lora_rank else model
    every = config.eval_steps or max(1, config.steps // 2)

    class Progress(TrainerCallback):
        """Trainer's progress as ours, and the curves."""

        loss = ""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = f"loss {logs['loss']:.3f}" if logs and "loss" in logs else self.loss

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report("adapt", state.global_step, state.max_steps, self.loss)
            if state.global_step % every == 0 and state.global_step < config.steps and not _is_in_parts(trainer):
                if args.process_index == 0:
                    curves.score(base, state.global_step)
                trainer.accelerator.wait_for_everyone()

    with checking_input():
        trainer = DiffusionTrainer(
            model,
            arguments,
            objective=config.objective_config(mask_id=DiffusionConfig.of(base).mask_id),
            anneal_steps=config.annealing_steps(),
            train_dataset=train,
            processing_class=tokenizer,
            callbacks=[Progress()],
        )
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries to stdout
    return trainer


def _show(curves: _Curves, out: Path) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    held, rows = curves.held, curves.last
    names = {step: "as it was" if step == "0" else f"step {step}" for step in rows}
    names[list(rows)[-1]] = "adapted"
    title = f"Held-out text: {held.numel()} tokens in {len(held)} blocks, nats ± standard error, one noise for all"
    console.print(scores_table(title, {names[step]: scores for step, scores in rows.items()}))
    if "0" in rows:
        difference = list(rows.values())[-1][1].diffusion_loss - rows["0"][1].diffusion_loss
        console.print(f"ELBO/token, adapted minus as it was: {difference}", markup=False)
    console.print(f"The adapted model is in {out}", markup=False)
