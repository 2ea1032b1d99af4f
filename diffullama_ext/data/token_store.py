# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents on disk: one long row of ids and where each document ends, mapped into memory.

A store is a folder: ``tokens.bin`` (little-endian uint16 or int32), ``ends.bin`` (int64, the place behind each
document) and ``store.json``, written whole or not at all, named by the digest of the data's and the tokenizer's
content. Block length and order are no part of it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..output_folder import written_at_once
from .packing import tokenized
from .source import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # of the format; another one is another fingerprint


@dataclass(frozen=True)
class TokenStore:
    """Tokens of all documents, one after the other.

    Attributes:
        tokens: [T] uint16 or int32, read-only, on disk.
        ends: [D] int64, increasing; document d is tokens[ends[d-1]:ends[d]].
    """

    tokens: np.ndarray
    ends: np.ndarray


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what decides the ids of a text: the whole fast tokenizer, or a slow one's class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = backend.to_str()
    else:
        state = json.dumps(
            [type(tokenizer).__qualname__, tokenizer.get_vocab(), str(tokenizer.init_kwargs)], sort_keys=True
        )
    marks = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    return hashlib.sha256(f"{marks}\0{state}".encode()).hexdigest()


def cached_store(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path, *, bos: bool = False
) -> TokenStore:
    """The source's documents as a store under ``cache_dir``, made on first use.

    Several processes may ask at once: each that finds nothing makes its own, and the first one's is kept, since others
    may be opening it.
    """
    key = f"{VERSION}\0{bos}\0{source.fingerprint()}\0{tokenizer_fingerprint(tokenizer)}"
    folder = Path(cache_dir).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".store.", dir=folder.parent) as scratch:
            own = Path(scratch, "store")
            write_store(own, source.texts(), tokenizer, bos=bos)
            try:
                own.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return open_store(folder)


def write_store(folder: Path, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False) -> None:
    """Tokenise into ``folder``; memory holds one batch of texts. Whatever is raised, no folder is left."""
    dtype = np.dtype("<u2") if len(tokenizer) <= 2**16 else np.dtype("<i4")
    ends, n_tokens = array("q"), 0
    with written_at_once(folder) as new:
        with open(new / "tokens.bin", "wb") as file:
            for ids, ends_here in tokenized(texts, tokenizer, bos=bos):
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                n_tokens += len(ids)
                if ends_here:
                    ends.append(n_tokens)
        if not ends:
            raise ValueError("there is no text to tokenise")
        with open(new / "ends.bin", "wb") as file:
            file.write(np.asarray(ends, dtype="<i8").tobytes())
        about = {"version": VERSION, "dtype": dtype.str, "n_tokens": n_tokens, "n_documents": len(ends)}
        with open(new / "store.json", "w", encoding="utf-8") as file:
            json.dump(about, file)


def open_store(folder: str | Path) -> TokenStore:
    """A store that :func:`write_store` wrote.

    Raises:
        ValueError: the folder holds something else, or files of other sizes than it says.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        dtypes = {"tokens": np.dtype(about["dtype"]), "ends": np.dtype("<i8")}
        counts = {"tokens": about["n_tokens"], "ends": about["n_documents"]}
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in dtypes}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a store of tokens ({error}); delete it to make it again") from error
    for name, dtype in dtypes.items():
        if about["version"] != VERSION or sizes[name] != counts[name] * dtype.itemsize:
            raise ValueError(
                f"{folder} is damaged: {name}.bin has {sizes[name]} bytes, {counts[name]} entries need "
                f"{counts[name] * dtype.itemsize}; delete it to make it again"
            )
    mapped = {name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r") for name, dtype in dtypes.items()}
    return TokenStore(**mapped)
