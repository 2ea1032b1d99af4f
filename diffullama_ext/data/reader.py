# SPDX-License-Identifier: Apache-2.0
"""Texts from a user's files: plain text, JSON lines, Parquet, or a folder of these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def _format_of(path: Path) -> str | None:
    """What the name says: json, parquet, text, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    for name, known in (("json", JSON_SUFFIXES), ("parquet", PARQUET_SUFFIXES), ("text", TEXT_SUFFIXES)):
        if last in known:
            return name
    return None


def read_texts(path: str | Path, *, column: str = "text") -> Iterator[str]:
    """The documents under ``path``, one at a time, in the order of the file names.

    A ``.jsonl``/``.json``/``.ndjson`` or ``.parquet`` file holds one document a row, in ``column``; a folder made by
    ``datasets.save_to_disk`` likewise; any other file is one UTF-8 document. Of a folder, every file (at any depth)
    with a known suffix is read: those, ``.txt``, ``.md``, ``.rst`` and ``.py``. JSON and Parquet are read by
    ``datasets``, compressed too, and nothing is cached.

    Raises:
        FileNotFoundError: no such path; at once, the others while iterating.
        ValueError: nothing to read there, a file that is not what its name says, binary data, or no such column.
        OSError: a file that may not be read.
    """
    return _read(_existing(path), column)


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of the JSON and Parquet files, or of the saved dataset, under ``path``; errors as of read_texts.

    A file of plain text has no rows: ValueError.
    """
    path = _existing(path)

    def rows() -> Iterator[dict[str, Any]]:
        for file, kind in _sources(path):
            if kind == "text":
                raise ValueError(f"{file} has no rows: give .jsonl, .parquet or a saved dataset")
            yield from _rows(file, kind)

    return rows()


def read_files(path: str | Path) -> list[Path]:
    """Every file whose bytes decide what :func:`read_texts` gives, in its order."""
    files: list[Path] = []
    for source, _ in _sources(_existing(path)):
        files += [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    return files


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    return path


def _read(path: Path, column: str) -> Iterator[str]:
    """Documents with more than white space in them; an error where there is none."""
    found = False
    for file, kind in _sources(path):
        documents = _text(file) if kind == "text" else (text_cell(row, column, file) for row in _rows(file, kind))
        for document in documents:
            if document.strip():
                found = True
                yield document
    if not found:
        raise ValueError(f"no text in {path}")


def _sources(path: Path) -> list[tuple[Path, str]]:
    """(path, format) of everything to read."""
    if path.is_file():
        return [(path, _format_of(path) or "text")]
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return [(path, "saved dataset")]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sources = [(file, kind) for file in files if (kind := _format_of(file))]
    if not sources:
        known = " ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES))
        raise ValueError(f"no file to read in {path}; known suffixes: {known}")
    return sources


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    return ValueError(f"{path} is not readable as {kind}: {' '.join(str(error).split())}")


def _text(path: Path) -> Iterator[str]:
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            data = file.read()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x})") from error
    except (EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's own message names the file
        raise _unreadable(path, "compressed text", error) from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds zero bytes")
    yield text


def _rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        if kind == "saved dataset":
            saved = datasets.load_from_disk(str(path))
            parts = list(saved.values()) if isinstance(saved, datasets.DatasetDict) else [saved]
        elif path.stat().st_size == 0:
            parts = []  # datasets cannot infer the columns of nothing
        else:
            parts = [datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)]
        for part in parts:
            yield from part
    except (ValueError, KeyError, EOFError, OSError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _unreadable(path, kind, error) from error


def text_cell(row: dict[str, Any], column: str, path: str | Path) -> str:
    """The text of ``column``, "" where it is null; ValueError where there is none or it is something else."""
    if column not in row:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(repr, row))}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {column!r} of {path} must hold text, got {type(value).__name__}")
    return value or ""
