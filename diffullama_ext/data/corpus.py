# SPDX-License-Identifier: Apache-2.0
"""Text that every CPython carries: its documentation topics and the sources of its standard library."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Not prose and not typical code: test data, character tables, graphical tools, installed packages.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "encodings", "pydoc_data"),
    *("idlelib", "turtledemo", "tkinter", "lib2to3", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__"),
}
MIN_CHARS = 100_000


class Document(NamedTuple):
    """One file or topic."""

    name: str  # "topic/assert", "lib/json/decoder.py"
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents, split so that no file or topic is on both sides."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    skipped: tuple[str, ...] = ()  # files that could not be read

    def fingerprint(self) -> str:
        """Digest of names, texts and split: equal corpora (the same CPython) have equal digests."""
        digest = hashlib.sha256()
        for side in (self.train, self.heldout):
            for document in side:
                digest.update(f"{document.name}\0{document.text}\0".encode())
            digest.update(b"\1")
        return digest.hexdigest()[:16]


def is_heldout(name: str, share: float) -> bool:
    """Whether a document is held out: a function of its name alone, so a missing file moves no other."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return word < share * 2**32


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield Document(f"topic/{name}", topics[name])


def _source_files(stdlib: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS  # os.walk goes into what is left
        # _sysconfigdata is a table of this machine's build
        files += [Path(folder, name) for name in names if name.endswith(".py") and "_sysconfigdata" not in name]
    return sorted(files, key=lambda path: path.relative_to(stdlib).as_posix())


def python_corpus(*, heldout_share: float = 0.05, max_chars: int | None = None, stdlib: Path | None = None) -> Corpus:
    """The documentation topics and standard-library sources of the running CPython.

    Args:
        heldout_share: share of the documents that is held out, in (0, 1), chosen by a hash of the name.
        max_chars: stop after about so many characters, in an order that mixes topics and files; None reads all.
        stdlib: folder of the sources; None asks sysconfig.

    Raises:
        ValueError: heldout_share outside (0, 1); less than 100 000 characters found, or nothing for one side.
    """
    if not 0.0 < heldout_share < 1.0:
        raise ValueError(f"heldout_share must be in (0, 1), got {heldout_share!r}")
    stdlib = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    documents, skipped = list(_topics()), []
    for path in _source_files(stdlib):
        name = f"lib/{path.relative_to(stdlib).as_posix()}"
        try:
            documents.append(Document(name, path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            skipped.append(name)
    if max_chars is not None:
        documents = _limited(documents, max_chars)
    n_chars = sum(len(document.text) for document in documents)
    train = tuple(document for document in documents if not is_heldout(document.name, heldout_share))
    heldout = tuple(document for document in documents if is_heldout(document.name, heldout_share))
    if n_chars < min(MIN_CHARS, max_chars or MIN_CHARS) or not train or not heldout:
        raise ValueError(
            f"this Python carries too little text for a corpus: {len(documents)} documents, {n_chars} characters "
            f"({len(heldout)} held out) in pydoc_data.topics and {stdlib}"
        )
    return Corpus(train, heldout, tuple(skipped))


def _limited(documents: list[Document], max_chars: int) -> list[Document]:
    """A subset of about ``max_chars``, taken by hash of the name and returned in the old order."""
    chosen, total = set(), 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(f"order/{d.name}".encode()).digest()):
        if total >= max_chars:
            break
        chosen.add(document.name)
        total += len(document.text)
    return [document for document in documents if document.name in chosen]
