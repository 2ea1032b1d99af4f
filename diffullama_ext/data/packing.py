# SPDX-License-Identifier: Apache-2.0
"""Documents to token blocks of one length: tokenise, join with the end-of-text token, cut."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 1 << 20  # longest text given to the tokenizer at once; it needs about 100 bytes a token while it works
BATCH_CHARS = 1 << 22  # texts gathered for one parallel call of the tokenizer


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of at most PIECE_CHARS, cut behind a line end where there is one."""
    start = 0
    while start < len(text):
        stop = min(start + PIECE_CHARS, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece, whether its document ends with it)."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        pieces = list(_pieces(text))
        for index, piece in enumerate(pieces):
            batch.append((piece, index == len(pieces) - 1))
            size += len(piece)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def check_length(length: int) -> None:
    """A block holds a token and its target."""
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}")


def tokenized(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False
) -> Iterator[tuple[list[int], bool]]:
    """(ids, whether a document ends with them) piece by piece; a document is closed by the end-of-text token.

    ``bos`` opens each document with the tokenizer's bos token. ValueError where the tokenizer lacks such a token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token, which separates documents; set one")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("tokenizer has no bos_token, which bos=True puts before each document; set one")
    starts = True
    for batch in _batches(texts):
        # verbose=False: no warning that a document is longer than the model's context; it is cut into blocks
        rows = tokenizer([piece for piece, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for row, (_, ends) in zip(rows, batch, strict=True):
            head = [tokenizer.bos_token_id] if bos and starts else []
            yield [*head, *row, *([tokenizer.eos_token_id] if ends else [])], ends
            starts = ends


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Tokens of all texts, each document closed by the end-of-text token, cut into blocks.

    Blocks cross document borders and the incomplete last one is dropped, as in the pretraining of the adapted models.

    Args:
        texts: documents; empty ones are dropped.
        tokenizer: with an ``eos_token_id``; adds no other special token here.
        length: tokens of a block, at least 2.

    Returns:
        int32 [N, length], N >= 1; all tokens are held in memory, 4 bytes each.

    Raises:
        ValueError: length below 2, a tokenizer without an end-of-text token, or fewer tokens than one block holds.
    """
    check_length(length)
    tokens = array("i")
    n_texts = 0
    for row, ends in tokenized(texts, tokenizer):
        tokens.extend(row)
        n_texts += ends
    n_blocks = len(tokens) // length
    if n_blocks == 0:
        raise ValueError(
            f"the data is too short: {n_texts} documents make {len(tokens)} tokens, one block needs {length}"
        )
    return torch.frombuffer(tokens, dtype=torch.int32)[: n_blocks * length].reshape(n_blocks, length)


def split_blocks(blocks: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(train, held out): the last ``share`` of the blocks, at least one on either side; they share no text.

    Raises:
        ValueError: share outside (0, 1), or a single block, which cannot be split.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must be in (0, 1), got {share!r}")
    n_heldout = min(max(1, round(share * len(blocks))), len(blocks) - 1)
    if len(blocks) < 2:
        raise ValueError(f"the data is too short: {len(blocks)} block of {blocks.shape[1]} tokens cannot be split")
    return blocks[:-n_heldout], blocks[-n_heldout:]


class TokenBlocks(Dataset):
    """Blocks int32 [N, L] as a dataset of ``{"input_ids": int64 [L]}``, for transformers.Trainer and any DataLoader."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index].long()}
