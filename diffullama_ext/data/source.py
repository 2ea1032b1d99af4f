# SPDX-License-Identifier: Apache-2.0
"""Where a run's data comes from: local files or a dataset of the Hugging Face Hub, and its share of the mixture."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_range
from .reader import read_files, read_rows, read_texts, text_cell


@dataclass(frozen=True)
class DataSource:
    """One part of the training data.

    Attributes:
        path: a file or folder that :func:`read_texts` reads, or an id of the Hub ("org/name") where there is no such
            path. A leading "./" is never an id.
        weight: its share of the blocks, relative to the other sources'.
        column: of the text, in JSON, Parquet and datasets.
        split, subset: of a dataset of the Hub.
    """

    path: str
    weight: float = 1.0
    column: str = "text"
    split: str = "train"
    subset: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        check_range("weight", self.weight, 0.0, math.inf, low_open=True)
        if math.isinf(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")

    @property
    def is_local(self) -> bool:
        """Whether ``path`` is on this machine, or could only be."""
        path = Path(self.path).expanduser()
        return path.exists() or path.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") > 1

    def texts(self, *, streaming: bool = False) -> Iterator[str]:
        """The documents, one at a time; errors as of :func:`read_texts`. Streaming downloads nothing to keep."""
        if self.is_local:
            return read_texts(self.path, column=self.column)
        cells = (text_cell(row, self.column, self.path) for row in self._hub(streaming=streaming))
        return (text for text in cells if text.strip())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of JSON, Parquet, a saved dataset or a dataset of the Hub; for prompts and responses."""
        return read_rows(self.path) if self.is_local else iter(self._hub(streaming=False))

    def fingerprint(self) -> str:
        """Digest of what :meth:`texts` gives: of the bytes of local files, of a Hub dataset's own fingerprint."""
        digest = hashlib.sha256(f"{self.column}\0".encode())
        if self.is_local:
            for file in read_files(self.path):
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                with open(file, "rb") as opened:
                    while part := opened.read(1 << 20):
                        digest.update(part)
        else:
            digest.update(
                f"{self.path}\0{self.subset}\0{self.split}\0{self._hub(streaming=False)._fingerprint}".encode()
            )
        return digest.hexdigest()

    def _hub(self, *, streaming: bool) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.path, self.subset, split=self.split, streaming=streaming)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(f"no file, folder or dataset of the Hub {self.path!r}: {reason}") from error


def check_sources(sources: Sequence[DataSource]) -> None:
    """At least one, in a sequence."""
    if isinstance(sources, DataSource) or not all(isinstance(source, DataSource) for source in sources):
        raise TypeError(f"sources must be a sequence of DataSource, got {sources!r}")
    if not sources:
        raise ValueError("sources must be at least one, got none")
