# SPDX-License-Identifier: Apache-2.0
"""What `sample` and `infill` share: one input shown as it is written, or a file of them in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .console import Report, reporting
from .errors import BadInput, checking_input
from .jsonl import Output, Record, fingerprint, read_records
from .policy_option import parse_policy

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling import StepHook

# (inputs, sample index [inputs * n], hook) -> an output for each sample, those of an input next to each other
Write = Callable[[Sequence[Record], "Tensor", "StepHook | None"], list[Record]]


@dataclass(frozen=True)
class Sampling:
    """How to sample: arguments of :func:`diffullama_ext.sampling.generate` and ``infill``, as given."""

    policy: str
    steps: int | None
    block_length: int | None
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    n: int
    cfg: float
    cache: str | None

    def arguments(self) -> dict[str, Any]:
        """Keywords of the call; ValueError where the policy's text is wrong."""
        return {**vars(self), "policy": parse_policy(self.policy)}


@dataclass(frozen=True)
class Shown:
    """Where results and pictures go."""

    as_json: bool
    html: Path | None
    live: bool

    def check(self) -> None:
        """ValueError before any work where the page cannot be written."""
        if self.html is not None and (self.html.is_dir() or not self.html.absolute().parent.is_dir()):
            raise ValueError(f"--html must be a file in a folder that is there, got {self.html}")


@dataclass(frozen=True)
class Files:
    """A batch: inputs, where outputs go (None: stdout), inputs a batch."""

    source: Path | None
    out: Path | None
    batch_size: int

    def records(self, shown: Shown, check: Callable[[Record], object]) -> list[Record] | None:
        """The inputs, None where there is no file; ValueError where the options do not go together."""
        if self.source is None:
            if self.out is not None:
                raise ValueError("--out needs --in FILE.jsonl")
            return None
        if shown.html is not None or shown.live:
            raise ValueError("--html and --live are of one input: leave --in out")
        return read_records(self.source, check)


def run_one(title: str, record: Record, write: Write, n: int, total_steps: int, tokenizer: Any, shown: Shown) -> None:
    """One input, ``n`` times; ``total_steps`` is the bar's."""
    import torch

    from ..sampling.live import LiveView
    from ..sampling.page import write_page
    from ..sampling.token_text import token_text
    from ..sampling.trace import Trace

    hooks: list[StepHook] = []
    text_of, trace = token_text(tokenizer), Trace()
    with ExitStack() as stack:
        if shown.live:
            hooks.append(stack.enter_context(LiveView(text_of)))
        else:
            hooks.append(_bar(stack.enter_context(reporting()), title, total_steps))
        if shown.html is not None:
            hooks.append(trace)
        with checking_input():
            results = write([record], torch.arange(n), _all_of(hooks))
    if shown.html is not None:
        write_page(shown.html, trace, text_of, title=f"{title}: {trace.steps} steps")
    _print(results, shown.as_json)


def _all_of(hooks: Sequence[StepHook]) -> StepHook:
    def on_step(*step: Any) -> None:
        for hook in hooks:
            hook(*step)

    return on_step


def _bar(report: Report, title: str, total: int) -> StepHook:
    def on_step(state: Any, stats: object, written: object) -> None:
        through = not state.masked.any()
        report(title, total if through else min(state.step + 1, total), total, "")

    return on_step


def _print(results: Sequence[Record], as_json: bool) -> None:
    for index, record in enumerate(results, start=1):
        if as_json:
            typer.echo(json.dumps(record))
            continue
        if len(results) > 1:
            typer.echo(f"--- {index}")
        typer.echo(record["text"])


def run_batches(
    title: str, records: Sequence[Record], write: Write, n: int, files: Files, settings: dict[str, Any]
) -> None:
    """All inputs of a file; what an earlier run of the same settings finished is not done again.

    A sample is keyed by its input's number, so batches, and interruptions between them, do not change a text.
    """
    import torch

    keys = [fingerprint(settings, record) for record in records]
    with checking_input():
        output = None if files.out is None else Output(files.out, keys, n)
    done = output.done if output else set()
    left = [index for index in range(len(records)) if index not in done]
    if done:
        typer.echo(f"{files.out}: {len(done)} of {len(records)} are there", err=True)
    n_done = len(done)
    try:
        with reporting() as report:
            for batch in _batches(left, records, files.batch_size):
                sample_index = torch.tensor(batch)[:, None] * n + torch.arange(n)
                try:
                    results = write([records[index] for index in batch], sample_index.flatten(), None)
                except (ValueError, TypeError) as error:
                    lines = f"inputs {batch[0] + 1} to {batch[-1] + 1} of {files.source}"
                    raise BadInput(f"{lines}: {error}") from error
                rows = [
                    _row(index, sample, n, records[index], keys[index], results[place * n + sample])
                    for place, index in enumerate(batch)
                    for sample in range(n)
                ]
                if output is None:
                    typer.echo("\n".join(map(json.dumps, rows)))
                else:
                    output.write(rows)
                n_done += len(batch)
                report(title, n_done, len(records), "")
    finally:
        if output is not None:
            output.close()


def _batches(left: Sequence[int], records: Sequence[Record], size: int) -> Iterator[list[int]]:
    """Up to ``size`` consecutive inputs; one without a prompt is not in a batch with one that has one."""
    for _, group in groupby(left, key=lambda index: records[index].get("prompt") is None):
        members = list(group)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _row(index: int, sample: int, n: int, record: Record, key: str, result: Record) -> Record:
    row: Record = {"index": index}
    if "id" in record:
        row["id"] = record["id"]
    if n > 1:
        row["sample"] = sample
    return {**row, **result, "key": key}
