# SPDX-License-Identifier: Apache-2.0
"""What the commands show: progress on stderr, tables on stdout; and which device they use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from ..evaluation import DiffusionScores, Estimate

Report = Callable[[str, int, int, str], None]  # (stage, done, in all, note)


def quiet_libraries() -> None:
    """Errors reach the user as exceptions; the rest of what the libraries log does not."""
    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)  # or each retry of a download is a line
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()


@contextmanager
def reporting() -> Iterator[Report]:
    """Yields report(stage, done, in all, note): a bar a stage on a terminal, else a line when a stage is through."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_reporter(console)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "{task.fields[note]}")
    tasks: dict[str, TaskID] = {}
    with Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console) as bars:

        def report(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield report


def _line_reporter(console: Console) -> Report:
    begun: dict[str, float] = {}

    def report(stage: str, done: int, total: int, note: str) -> None:
        start = begun.setdefault(stage, time.perf_counter())
        if done == total:
            seconds = time.perf_counter() - start
            line = f"{stage}: {total} in {seconds:.1f} s {note}".rstrip()
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return report


def pick_device(name: str) -> torch.device:
    """The device of a name; auto is CUDA where there is one. ValueError where it is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return torch.device(name)


def scores_table(title: str, rows: Mapping[str, tuple[Estimate, DiffusionScores]]) -> Table:
    """One model a row: AR loss, ELBO, masked accuracy by t; each with its standard error. Fits 80 columns."""
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE, pad_edge=False)
    table.add_column("model", no_wrap=True)
    times = next(iter(rows.values()))[1].masked_accuracy
    for heading in ("AR loss", "ELBO/token", *(f"acc t={t:g}".replace("0.", ".") for t in times)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, (ar_loss, scores) in rows.items():
        accuracies = (f"{100 * a.mean:.1f}±{100 * a.stderr:.1f}%" for a in scores.masked_accuracy.values())
        table.add_row(name, str(ar_loss), str(scores.diffusion_loss), *accuracies)
    return table
