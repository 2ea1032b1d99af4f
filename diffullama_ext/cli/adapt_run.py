# SPDX-License-Identifier: Apache-2.0
"""One adaptation in a folder: it starts, goes on after it was cut off, and ends with a model."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..output_folder import flush, is_free, unfinished, write_file_at_once
from .adapt_curves import Curves, heldout_batch
from .console import Report, pick_device, quiet_libraries, reporting
from .errors import BadInput, checking_input, one_line
from .models import load_to_train, model_path

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from ..adapt_config import AdaptConfig

SETTINGS, ENVIRONMENT, CURVES, METRICS = "run.yaml", "environment.json", "curves.json", "metrics.json"
MODEL = "model"  # of the hidden folder that it is written into
WRITTEN = (SETTINGS, ENVIRONMENT, CURVES, METRICS, MODEL)
PACKAGES = ("diffullama-ext", "torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "numpy")


class _Inputs(NamedTuple):
    """What a run starts from."""

    model: Any  # adapted
    tokenizer: Any
    train: Dataset[dict[str, Tensor]]
    held: dict[str, Tensor]
    teacher: Any  # or None
    anneal_steps: int


class _Trained(NamedTuple):
    """What process 0 scores and saves."""

    inputs: _Inputs  # its model trained, merged of LoRA, in one piece
    curves: Curves
    has_curves: bool


def run_adaptation(config: AdaptConfig, out: Path, processes: int = 1) -> None:
    """Train, score and save; errors as of the command line."""
    with reporting() as report:
        trained = _train(config, out, processes, report)
        _end_process_group()  # what follows is for process 0 alone, however long it takes
        if trained is None:
            return
        if trained.has_curves:
            trained.curves.score(trained.inputs.model, config.steps)
    _finish(config, out, trained)


def _end_process_group() -> None:
    """Of torch, when nothing else holds it any more.

    Who drops it last waits for gloo's threads, and they may wait for the GIL, to free what Python has seen of a
    collective: DDP's wrapper would keep the GIL meanwhile, destroy_process_group gives it up. Threads that outlive the
    interpreter abort the process.
    """
    import torch

    gc.collect()  # the trainer, with DDP's wrapper
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _train(config: AdaptConfig, out: Path, processes: int, report: Report) -> _Trained | None:
    """All that processes do together; None where another process scores and saves."""
    import torch

    from ..integrations import add_lora
    from ..training.checkpoints import checkpoints

    with checking_input():
        where = pick_device(config.device)
        _check_machine(config, where.type)
        result: _Inputs | Exception
        try:
            _check_folder(config, out)
            result = _inputs(config)
        except Exception as error:
            if processes == 1:
                raise
            result = error
        arguments = config.training_arguments(  # in which processes meet
            out, processes=processes, use_cpu=where.type == "cpu", dataloader_pin_memory=where.type == "cuda"
        )
        inputs = _of_all(result, processes)
        loaded = inputs.model
        model: Any = loaded.to(where)
        if config.lora_rank:
            torch.manual_seed(config.seed)  # its matrices begin at random
            model = add_lora(loaded, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)
        trainer = _trainer(config, model, inputs, arguments)
    if arguments.process_index == 0:
        _start(config, out)
    # A model in parts cannot be scored by one process, nor have its adapter merged.
    in_parts = trainer.is_sharded
    curves = Curves(out / CURVES, inputs.held, config.objective.get("block_length"), config.batch_size, report)
    trainer.add_callback(_progress(config, loaded, trainer, None if in_parts else curves, report))
    if arguments.process_index == 0 and not in_parts and not checkpoints(out):
        curves.score(loaded, 0)
    trainer.train(resume_from_checkpoint=bool(checkpoints(out)))
    if in_parts:
        model = trainer.whole_model()
    if arguments.process_index != 0:
        return None
    loaded = model.merge_and_unload() if config.lora_rank else model
    return _Trained(inputs._replace(model=loaded), curves, has_curves=not in_parts)


def _of_all(result: _Inputs | Exception, processes: int) -> _Inputs:
    """The inputs; where a process has an error it raises it, and the others BadInput: they would wait for it long."""
    import torch

    messages: list[str | None] = [None] * processes
    if processes > 1:
        torch.distributed.all_gather_object(messages, one_line(result) if isinstance(result, Exception) else None)
    if isinstance(result, Exception):
        raise result
    failed = [f"process {place}: {message}" for place, message in enumerate(messages) if message is not None]
    if failed:
        raise BadInput(f"{len(failed)} of {processes} processes failed; {failed[0]}")
    return result


def _check_machine(config: AdaptConfig, device: str) -> None:
    """ValueError where this machine lacks what the settings ask for."""
    from transformers.integrations import get_available_reporting_integrations

    if config.fp16 and device == "cpu":
        raise ValueError("fp16 must be False on the CPU, got True; bf16 works there")
    installed = get_available_reporting_integrations()
    for name in config.report_to:
        if name not in installed:
            here = ", ".join(installed) or "none"
            raise ValueError(f"report_to must be a logger of transformers that is installed ({here}), got {name!r}")


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_folder(config: AdaptConfig, out: Path) -> None:
    """BadInput where ``out`` holds anything but the beginning of this very run."""
    from ..adapt_config import AdaptConfig

    if is_free(out, *WRITTEN):
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
    """The record of what runs: settings with every default, and versions. What a killed process left half done goes."""
    out.mkdir(parents=True, exist_ok=True)
    for path in unfinished(out, *WRITTEN):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_file_at_once(out / SETTINGS, config.to_yaml())
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    write_file_at_once(out / ENVIRONMENT, json.dumps(versions, indent=2) + "\n")


def _finish(config: AdaptConfig, out: Path, trained: _Trained) -> None:
    """The model's files appear with config.json, which makes the folder a model, as the last of them."""
    inputs, curves = trained.inputs, trained.curves
    with tempfile.TemporaryDirectory(prefix=f".{MODEL}.", dir=out) as staged:
        inputs.model.save_pretrained(staged)
        inputs.tokenizer.save_pretrained(staged)
        for file in Path(staged).rglob("*"):
            flush(file)
        for file in sorted(Path(staged).iterdir(), key=lambda path: path.name == "config.json"):
            if file.is_dir():  # chat templates; of a run that was killed here, and a folder takes no full one's place
                shutil.rmtree(out / file.name, ignore_errors=True)
            os.replace(file, out / file.name)
    held = curves.held["blocks"]
    metrics = {
        "kind": "diffullama adapt",
        "model": config.model,
        "data": list(config.data),
        "examples": {"train": len(inputs.train), "heldout": len(held)},  # type: ignore[arg-type]
        "length": held.shape[1],
        "anneal_steps": inputs.anneal_steps,
        "max_steps": config.steps,
        "seed": config.seed,
        "models": {
            name: curves.by_step[step]  # none of a model in parts
            for name, step in (("as it was", "0"), ("adapted", str(config.steps)))
            if step in curves.by_step
        },
    }
    write_file_at_once(out / METRICS, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    curves.show(out)


# --- parts ------------------------------------------------------------------------------------------------------------


def _inputs(config: AdaptConfig) -> _Inputs:
    """Everything that is loaded; errors about the data come before a large model is loaded, where they can."""
    quiet_libraries()
    from ..data import DataSource
    from ..integrations import DiffusionConfig, adapt, is_adapted

    weights = config.data_weight or (1.0,) * len(config.data)
    sources = [DataSource(path, w, config.column) for path, w in zip(config.data, weights, strict=True)]
    for source in sources:
        next(source.rows() if config.sft else source.texts(streaming=True), None)
    model, tokenizer = load_to_train(config.model)
    known = DiffusionConfig.of(model) if is_adapted(model) else None
    shift = config.shifted(None if known is None else known.shift)
    steps = config.annealing_steps(is_adapted=known is not None)
    train, held = _train_and_heldout(config, sources, tokenizer, _length(config, model), shift)
    mask_token = config.mask_token_or_id()
    if mask_token is None and known is not None:
        mask_token = known.mask_id
    adapt(model, tokenizer, mask_token=mask_token, shift=shift, anneal_steps=steps)
    teacher = None if config.teacher is None else _teacher(config, model, tokenizer)
    return _Inputs(model, tokenizer, train, heldout_batch(held, tokenizer.pad_token_id or 0), teacher, steps)


def _length(config: AdaptConfig, model: Any) -> int:
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    length = min(512, limit) if config.length is None else config.length
    if length > limit:
        raise BadInput(f"--length must be at most the model's {limit} positions, got {length}")
    return length


def _train_and_heldout(config: AdaptConfig, sources: Any, tokenizer: Any, length: int, shift: bool) -> tuple[Any, Any]:
    from ..data import load_sft_train_and_heldout, load_train_and_heldout

    common: dict[str, Any] = {"heldout": config.heldout}
    if config.sft:
        common |= {"padding": config.padding, "columns": config.sft_columns()}
        return load_sft_train_and_heldout(sources, tokenizer, length, **common)
    common |= {"context": config.block_context(shift), "isolate_documents": config.isolate_documents}
    return load_train_and_heldout(sources, tokenizer, length, **common)


def _teacher(config: AdaptConfig, model: Any, tokenizer: Any) -> Any:
    """The teacher, frozen; ValueError where an id is another token to it."""
    import torch

    from ..integrations import DiffusionConfig, load

    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    assert config.teacher is not None
    teacher, its_tokenizer = load(model_path(config.teacher), dtype=dtype)
    ids = [DiffusionConfig.of(one).mask_id for one in (teacher, model)]
    vocabularies = [
        {token: i for token, i in of.get_vocab().items() if i != mask_id}
        for of, mask_id in zip((its_tokenizer, tokenizer), ids, strict=True)
    ]
    if ids[0] != ids[1]:
        raise ValueError(f"teacher must have the model's mask id {ids[1]}, got {ids[0]} of {config.teacher}")
    if vocabularies[0] != vocabularies[1]:
        differ = len(vocabularies[0].items() ^ vocabularies[1].items())
        raise ValueError(
            f"teacher must have the model's vocabulary, that of {config.teacher} differs in {differ} entries"
        )
    return teacher.eval().requires_grad_(False)


def _trainer(config: AdaptConfig, model: Any, inputs: _Inputs, arguments: Any) -> Any:
    from transformers import PrinterCallback

    from ..integrations import DiffusionConfig
    from ..objective.model_forward import check_ids
    from ..training import DiffusionTrainer

    diffusion = DiffusionConfig.of(inputs.model)
    objective = config.objective_config(mask_id=diffusion.mask_id, shift=diffusion.shift)
    teacher = inputs.teacher
    if teacher is not None:
        teacher.to(arguments.device)
        if objective.teacher_shift is None:
            objective = dataclasses.replace(objective, teacher_shift=DiffusionConfig.of(teacher).shift)
    check_ids(model, objective)
    trainer = DiffusionTrainer(
        model,
        arguments,
        objective=objective,
        anneal_steps=inputs.anneal_steps,
        teacher=teacher,
        train_dataset=inputs.train,
        processing_class=inputs.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries to stdout
    return trainer


def _progress(config: AdaptConfig, model: Any, trainer: Any, curves: Curves | None, report: Report) -> Any:
    from transformers import TrainerCallback

    every = config.eval_steps or max(1, config.steps // 2)

    class Progress(TrainerCallback):
        """Trainer's progress as ours, and the curves."""

        loss = ""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = f"loss {logs['loss']:.3f}" if logs and "loss" in logs else self.loss

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            report("adapt", state.global_step, state.max_steps, self.loss)
            if state.global_step % every == 0 and state.global_step < config.steps and curves is not None:
                if args.process_index == 0:
                    curves.score(model, state.global_step)
                trainer.accelerator.wait_for_everyone()

    return Progress()
