# SPDX-License-Identifier: Apache-2.0
"""Texts from a user's files: plain text, JSON lines, Parquet, or a folder of these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    return _read(path, column)


def _read(path: Path, column: str) -> Iterator[str]:
    """Documents with more than white space in them; an error where there is none."""
    found = False
    for file, kind in _sources(path):
        documents = _text(file) if kind == "text" else (_cell(row, column, file) for row in _rows(file, kind))
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


def _rows(path: Path, kind: str) -> Iterator[dict[str, object]]:
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


def _cell(row: dict[str, object], column: str, path: Path) -> str:
    if column not in row:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(repr, row))}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"column {column!r} of {path} must hold text, got {type(value).__name__}")
    return value or ""
