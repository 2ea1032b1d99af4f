# SPDX-License-Identifier: Apache-2.0
"""What a demo run leaves behind: model/, metrics.json, samples.jsonl and samples.txt, all or nothing."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .._library import build_info
from .._version import __version__
from ..output_folder import is_free, written_at_once
from .pipeline import ADAPTED, DemoRun

KIND = "diffullama demo"  # marks metrics.json: a folder with it may be replaced


def check_replaceable(out: Path) -> None:
    """FileExistsError where ``out`` holds anything else than a former demo run."""
    if is_free(out):
        return
    try:
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        former = isinstance(metrics, dict) and metrics.get("kind") == KIND
    except (OSError, ValueError):
        former = False
    if not former:
        raise FileExistsError(f"{out} exists and is not a former demo run; give another --out or remove it")


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    packages = ("torch", "transformers", "tokenizers")
    return {"diffullama-ext": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def _machine(device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": {key: str(value) for key, value in build_info().items()},
    }


def metrics_of(run: DemoRun) -> dict[str, Any]:
    """Every figure of the run, and what it takes to repeat it."""
    return {
        "kind": KIND,
        "config": run.config.to_dict(),
        "versions": versions(),
        "machine": _machine(run.device),
        "corpus": {
            "fingerprint": run.corpus.fingerprint(),
            "train_documents": len(run.corpus.train),
            "heldout_documents": len(run.corpus.heldout),
            "unreadable_files": list(run.corpus.skipped),
            "train_tokens": run.train.numel(),
            "heldout_tokens_scored_on": run.heldout.numel(),
        },
        "models": {
            name: {"ar_loss": scores.ar_loss.to_dict(), **scores.diffusion.to_dict()}
            for name, scores in run.scores.items()
        },
        "diffusion_loss_differences": {
            f"{ADAPTED} - {name}": run.difference(name).to_dict() for name in run.scores if name != ADAPTED
        },
        "training_loss": {stage: [round(loss, 4) for loss in losses] for stage, losses in run.training_loss.items()},
        "seconds": {stage: round(seconds, 2) for stage, seconds in run.seconds.items()},
    }


def _samples_as_text(run: DemoRun) -> str:
    rule = "=" * 80
    parts = [f"{rule}\nsampled\n{rule}\n{text}\n" for text in run.samples]
    for item in run.infilled:
        parts.append(
            f"{rule}\n{item.document}, held out\n{rule}\n{item.prompt}\n"
            f"--- written: {item.filled!r}\n--- held out: {item.truth!r}\n"
        )
    return "\n".join(parts)


def write_run(run: DemoRun, out: Path) -> None:
    """Write the run directory.

    Raises:
        FileExistsError: ``out`` is not empty and not a former demo run.
    """
    if run.model is None:
        raise ValueError("the run is not finished: it has no model")
    check_replaceable(out)
    with written_at_once(out) as folder:
        run.model.save_pretrained(folder / "model")
        run.tokenizer.save_pretrained(folder / "model")
        samples = [{"kind": "sample", "text": text} for text in run.samples]
        samples += [{"kind": "infill", **asdict(item)} for item in run.infilled]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
        (folder / "samples.txt").write_text(_samples_as_text(run), encoding="utf-8")
        metrics = json.dumps(metrics_of(run), indent=2, allow_nan=False)
        (folder / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
