# SPDX-License-Identifier: Apache-2.0
"""Documents to blocks."""

import pytest
import torch
from tiny_models import word_tokenizer

from diffullama_ext.data import TokenBlocks, pack, packing, split_blocks, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a b c d\n" * 20], 270)


def joined(texts, tokenizer) -> list[int]:
    """The oracle: document after document, one at a time."""
    out = []
    for text in texts:
        if text:
            out += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return out


@pytest.mark.parametrize("length", [2, 3, 7, 40])
def test_blocks_are_the_joined_documents(tokenizer, length):
    texts = ["a b c d\n" * 3, "", "x", "d c b a\n\n" * 5]
    blocks = pack(texts, tokenizer, length)
    expected = joined(texts, tokenizer)
    assert blocks.dtype == torch.int32
    assert blocks.flatten().tolist() == expected[: len(expected) // length * length]
    assert blocks.shape[1] == length


def test_long_documents_are_cut_at_line_ends_without_a_separator(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARS", 50)
    monkeypatch.setattr(packing, "BATCH_CHARS", 120)
    texts = ["a b c d\n" * 40, "b c d e f g h i j k l\n" * 9]
    expected = joined(texts, tokenizer)
    assert pack(texts, tokenizer, 2).flatten().tolist() == expected[: len(expected) // 2 * 2]


def test_a_document_without_line_ends_still_ends(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARS", 10)
    blocks = pack(["z" * 95], tokenizer, 4)
    assert tokenizer.decode(blocks.flatten()).startswith("z" * 92)


def test_too_short_data_says_how_short(tokenizer):
    with pytest.raises(ValueError, match="the data is too short: 1 documents make 2 tokens, one block needs 64"):
        pack(["x"], tokenizer, 64)


def test_rejects_a_length_without_a_target(tokenizer):
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        pack(["x"], tokenizer, 1)


def test_rejects_a_tokenizer_that_cannot_separate_documents():
    with pytest.raises(ValueError, match="tokenizer has no eos_token"):
        pack(["w1 w2"], word_tokenizer(), 2)


@pytest.mark.parametrize(("share", "n_heldout"), [(0.1, 1), (0.3, 3), (0.01, 1), (0.99, 9)])
def test_split_holds_out_the_end(share, n_heldout):
    blocks = torch.arange(20, dtype=torch.int32).reshape(10, 2)
    train, heldout = split_blocks(blocks, share)
    assert torch.equal(torch.cat([train, heldout]), blocks)
    assert len(heldout) == n_heldout


@pytest.mark.parametrize(
    ("n", "share", "message"),
    [
        (5, 0.0, r"share must be in \(0, 1\), got 0.0"),
        (5, 1.0, "share must be"),
        (1, 0.5, "1 block of 2 tokens cannot"),
    ],
)
def test_split_rejects(n, share, message):
    with pytest.raises(ValueError, match=message):
        split_blocks(torch.zeros(n, 2, dtype=torch.int32), share)


def test_dataset_gives_int64_rows():
    dataset = TokenBlocks(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32))
    assert len(dataset) == 2
    assert dataset[1]["input_ids"].dtype == torch.int64
    assert dataset[1]["input_ids"].tolist() == [3, 4]
