# SPDX-License-Identifier: Apache-2.0
"""Text to token blocks: the corpus that every CPython carries, a reader of the user's files, a tokenizer, packing."""

from .corpus import Corpus, Document, python_corpus
from .packing import TokenBlocks, pack, split_blocks
from .reader import read_texts
from .tokenizer import train_tokenizer

__all__ = [
    "Corpus",
    "Document",
    "TokenBlocks",
    "pack",
    "python_corpus",
    "read_texts",
    "split_blocks",
    "train_tokenizer",
]
