# SPDX-License-Identifier: Apache-2.0
"""Batches from and to files of JSON lines, so that an interrupted run keeps what it finished and goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..output_folder import write_file_at_once

Record = dict[str, Any]


def read_records(path: Path, check: Callable[[Record], object]) -> list[Record]:
    """One object a line, blank lines left out; ``check(record)`` raises ValueError for one that cannot be used.

    Raises:
        ValueError: a line that is not a JSON object, or that ``check`` refuses, with its number; no line at all.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"is no JSON ({error.msg} at character {error.pos + 1}): {line[:40]!r}") from error
            if not isinstance(record, dict):
                raise ValueError(f"must be a JSON object, got {line[:40]!r}")
            check(record)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no line")
    return records


def fingerprint(settings: Mapping[str, Any], record: Record) -> str:
    """12 hex digits that differ where the settings of a run or the input differ."""
    text = json.dumps([settings, record], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Output:
    """The output file of a batch run: ``per_input`` lines for each input, each with "index" and "key" (fingerprint).

    What is there already is kept if it is of the same run, and the inputs that it covers are done. Lines that an
    interruption left incomplete are dropped.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, keys: Sequence[str], per_input: int) -> None:
        self._path = path
        kept: dict[int, list[str]] = {}
        dropped = False
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if line:
                index = self._index_of(line, number, number == len(lines), keys)
                dropped = dropped or index is None
                if index is not None:
                    kept.setdefault(index, []).append(line)
        whole = {index: rows for index, rows in kept.items() if len(rows) == per_input}
        if dropped or len(whole) < len(kept):
            write_file_at_once(path, "".join(f"{row}\n" for rows in whole.values() for row in rows))
        self.done = set(whole)
        self._file = path.open("a", encoding="utf-8")

    def _index_of(self, line: str, number: int, unfinished: bool, keys: Sequence[str]) -> int | None:
        """The input that a line answers; None for a last line that breaks off."""
        try:
            record = json.loads(line)
            index = record["index"]
            ours = record["key"] == keys[index]
        except json.JSONDecodeError:
            if unfinished:
                return None
            ours = False
        except (KeyError, IndexError, TypeError):
            ours = False
        if not ours:
            raise ValueError(
                f"--out {self._path}, line {number}, is not of this run (same model, options and input); name another "
                "file, or remove it"
            )
        return int(index)

    def write(self, records: Sequence[Record]) -> None:
        """Append the records of whole inputs, and see them on disk."""
        self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()
