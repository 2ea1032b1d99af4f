# SPDX-License-Identifier: Apache-2.0
"""Text to examples: files and datasets, tokenised, packed or paired; and the corpus that every CPython carries."""

from .blocks import BlockLayout, MixedBlocks, StoredBlocks, load_blocks, load_train_and_heldout
from .corpus import Corpus, Document, python_corpus
from .packing import TokenBlocks, pack, split_blocks
from .reader import read_rows, read_texts
from .sft import PADDINGS, SftColumns, SftExamples, load_sft, load_sft_train_and_heldout
from .source import DataSource
from .streaming import StreamedBlocks, stream_blocks
from .token_store import TokenStore, cached_store, open_store, write_store
from .tokenizer import train_tokenizer

__all__ = [
    "PADDINGS",
    "BlockLayout",
    "Corpus",
    "DataSource",
    "Document",
    "MixedBlocks",
    "SftColumns",
    "SftExamples",
    "StoredBlocks",
    "StreamedBlocks",
    "TokenBlocks",
    "TokenStore",
    "cached_store",
    "load_blocks",
    "load_sft",
    "load_sft_train_and_heldout",
    "load_train_and_heldout",
    "open_store",
    "pack",
    "python_corpus",
    "read_rows",
    "read_texts",
    "split_blocks",
    "stream_blocks",
    "train_tokenizer",
    "write_store",
]
