# SPDX-License-Identifier: Apache-2.0
"""Folders and files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """To the disk: a power failure may not leave a name without its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unfinished(out: Path, *names: str) -> list[Path]:
    """What a killed process left in ``out`` of writing ``names``: ``.NAME.`` and an end of its own."""
    return [path for name in names for path in out.glob(f".{name}.*")]


def is_free(out: Path, *names: str) -> bool:
    """Whether nothing would be lost by writing ``out``: it is absent, or a folder of nothing but :func:`unfinished`."""
    return not out.exists() or (out.is_dir() and set(out.iterdir()) <= set(unfinished(out, *names)))


@contextmanager
def written_at_once(out: Path) -> Iterator[Path]:
    """Yields a new folder beside ``out``; it takes the place of ``out`` if nothing is raised."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # one file system: renaming is atomic
    new, old = beside / "new", beside / "old"
    new.mkdir()
    try:
        yield new
        for path in (*new.rglob("*"), new):
            flush(path)
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_file_at_once(path: Path, text: str) -> None:
    """Write a file as UTF-8; where that fails, what was there stays as it is, and nothing else is left."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # one file system: replacing is atomic
    try:
        beside.write_text(text, encoding="utf-8")
        flush(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
