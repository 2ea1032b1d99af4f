# SPDX-License-Identifier: Apache-2.0
"""The tokenizer trained on the spot: lossless, repeatable, and with seams where lines are masked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from diffullama_ext.data import train_tokenizer
from diffullama_ext.data.tokenizer import END_OF_TEXT

TEXTS = [
    "def add(a, b):\n    return a + b\n\n" * 5,
    "class Counter:\n    def __init__(self):\n        self.n = 0\n" * 5,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320, max_length=64)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_special_tokens_and_size(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.mask_token is None
    assert tokenizer.eos_token == END_OF_TEXT
    assert 257 < len(tokenizer) <= 320
    assert tokenizer.model_max_length == 64
    assert len(ids(tokenizer, "def add(a, b):")) < len("def add(a, b):")  # it has learnt merges


@pytest.mark.parametrize("line", ["return a + b", "self.n = 0", "if not x:", "(a, b)", "_private"])
def test_a_masked_line_leaves_the_tokens_around_it_alone(tokenizer, line):
    before, after = "class Counter:\n    def __init__(self):\n        ", "\n\n        return a + b\n"
    whole = ids(tokenizer, before + line + after)
    assert whole == ids(tokenizer, before) + ids(tokenizer, line) + ids(tokenizer, after)


def test_training_is_repeatable(tokenizer):
    assert train_tokenizer(TEXTS, 320).get_vocab() == tokenizer.get_vocab()


def test_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert ids(loaded, TEXTS[1]) == ids(tokenizer, TEXTS[1])
    assert loaded.eos_token_id == 0


def test_rejects_a_vocabulary_without_all_bytes():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .* got 256"):
        train_tokenizer(TEXTS, 256)
