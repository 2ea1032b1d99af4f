# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and know the run that they belong to.

Trainer writes a checkpoint into a hidden folder; a manifest with the size of every file and the identity of the run
closes it; all is flushed to the disk; one rename gives it its name. A killed process leaves the hidden folder at most.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..output_folder import flush

MANIFEST = "diffullama.json"
STAGING = ".saving"
REPLACED = "replaced-"
SIGN = ".shared"
PREFIX = "checkpoint-"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.name != MANIFEST}


def commit(staged: Path, final: Path, run: dict[str, Any]) -> None:
    """Close the checkpoint ``staged`` with its manifest and move it to ``final``, replacing what is there."""
    manifest = {"run": run, "files": _sizes(staged)}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in (*staged.rglob("*"), staged):
        flush(path)
    if final.exists():
        final.rename(staged.with_name(REPLACED + final.name))
    staged.rename(final)
    flush(final.parent)


def clear(output_dir: Path) -> None:
    """Delete what a killed process left of a checkpoint, or of the sign by which processes see that they share.

    A checkpoint that had lost its name to one that did not get it has it again.
    """
    for path in (output_dir / STAGING).glob(f"{REPLACED}*"):
        final = output_dir / path.name.removeprefix(REPLACED)
        if not final.exists():
            path.rename(final)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    (output_dir / SIGN).unlink(missing_ok=True)


def rotate(output_dir: Path, keep: int | None, never: Collection[str]) -> None:
    """Delete the oldest but ``keep`` checkpoints, none named in ``never``; each loses its name first: none is torn."""
    if keep is None or keep < 1:
        return
    staging = output_dir / STAGING
    staging.mkdir(exist_ok=True)
    found = checkpoints(output_dir)
    for path in [path for path in found if path.name not in never][: max(0, len(found) - keep)]:
        path.rename(staging / path.name)
    shutil.rmtree(staging)


@contextmanager
def explaining(final: Path) -> Iterator[None]:
    """A failure to write (a full disk) becomes an OSError that says what is left; nothing new is."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        clear(final.parent)
        if isinstance(error, RuntimeError) and "writ" not in str(error):  # the only sign that torch.save gives
            raise
        whole = checkpoints(final.parent)
        left = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"
        reason = " ".join(str(error).split())
        raise OSError(f"{final.name} could not be saved: {reason}; nothing of it is kept; {left}") from error


def check_shared(output_dir: Path, accelerator: Accelerator) -> None:
    """OSError on every process where one does not see what process 0 writes: its part of checkpoints would lack."""
    sign = output_dir / SIGN
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        sign.touch()
    accelerator.wait_for_everyone()
    seen = torch.tensor(int(sign.exists()), device=accelerator.device)
    count = int(accelerator.reduce(seen, reduction="sum"))
    if accelerator.is_main_process:
        sign.unlink()
    if count < accelerator.num_processes:
        raise OSError(
            f"output_dir must be on a file system that all nodes see, but {accelerator.num_processes - count} of "
            f"{accelerator.num_processes} processes do not see what process 0 writes in {output_dir}"
        )


def check_checkpoint(folder: Path, run: dict[str, Any]) -> None:
    """ValueError where ``folder`` is no whole checkpoint of this very run, FileNotFoundError where it is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, of_run = dict(manifest["files"]), dict(manifest["run"])
    except FileNotFoundError:
        raise ValueError(f"{folder} is no checkpoint of DiffusionTrainer: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is torn: {MANIFEST} is not readable ({error})") from error
    present = _sizes(folder)
    torn = [f"{name} has {present.get(name, 0)} of {size} bytes" for name, size in files.items()
            if present.get(name) != size]  # fmt: skip
    if torn:
        whole = [path.name for path in checkpoints(folder.parent) if path != folder]
        others = f"; other checkpoints: {', '.join(whole)}" if whole else ""
        raise ValueError(f"{folder} is torn: {'; '.join(torn)}{others}")
    run = json.loads(json.dumps(run))
    changed = [f"{name} was {of_run.get(name)}, is {run.get(name)}" for name in {**of_run, **run}
               if of_run.get(name) != run.get(name)]  # fmt: skip
    if changed:
        raise ValueError(f"{folder} belongs to another run: {'; '.join(changed)}")
