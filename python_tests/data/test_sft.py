# SPDX-License-Identifier: Apache-2.0
"""Prompts and responses as examples."""

import json

import pytest
from tiny_models import WORDS, word_tokenizer

from diffullama_ext.data import DataSource, SftColumns, load_sft

EOS, BOS = WORDS.index("w58"), WORDS.index("w57")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] == 'user' and 'w1 ' or 'w2 ' }}{{ m['content'] }} w3 {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture
def tokenizer():
    return word_tokenizer(eos_token="w58", bos_token="w57")


def source(tmp_path, rows, name="a.jsonl", **options) -> DataSource:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path, **options)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def as_lists(dataset) -> list[tuple[list[int], list[int]]]:
    return [(dataset[i]["input_ids"].tolist(), dataset[i]["maskable"].long().tolist()) for i in range(len(dataset))]


def pair(prompt, response):
    return {"prompt": prompt, "response": response}


def test_the_prompt_is_protected_and_the_padding_follows_the_switch(tmp_path, tokenizer):
    data = source(tmp_path, [pair("w5 w6", "w7 w8 w9"), pair("w5", "w6")])
    rows = [[BOS, *ids("w5 w6 w7 w8 w9"), EOS], [BOS, *ids("w5 w6"), EOS]]
    n_prompts = [3, 2]
    excluded = [(row, [0] * n + [1] * (len(row) - n)) for row, n in zip(rows, n_prompts, strict=True)]
    assert as_lists(load_sft([data], tokenizer, 9, padding="exclude")) == excluded
    filled = [(row + [EOS] * (9 - len(row)), able + [1] * (9 - len(row))) for row, able in excluded]
    assert as_lists(load_sft([data], tokenizer, 9, padding="eos")) == filled
    assert as_lists(load_sft([data], tokenizer, 9)) == filled


def test_something_stands_before_a_response_without_a_prompt(tmp_path):
    data = source(tmp_path, [pair("", "w7")])
    without_bos = load_sft([data], word_tokenizer(eos_token="w58"), 9, padding="exclude")
    assert as_lists(without_bos) == [([EOS, *ids("w7"), EOS], [0, 1, 1])]


def test_a_chat_is_split_before_its_last_answer(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "w10"), ("assistant", "w11"), ("user", "w12"), ("assistant", "w13 w14")]
    chat = [{"role": role, "content": content} for role, content in turns]
    data = source(tmp_path, [{"messages": chat}])
    prompt, response = ids("w1 w10 w3 w2 w11 w3 w1 w12 w3 w2"), [*ids("w13 w14 w3"), EOS]
    expected = [(prompt + response, [0] * len(prompt) + [1] * len(response))]
    assert as_lists(load_sft([data], tokenizer, 50, padding="exclude")) == expected


def test_other_columns_and_mixtures(tmp_path, tokenizer):
    columns = SftColumns(prompt="q", response="a")
    first = source(tmp_path, [{"q": "w5", "a": "w6"}], weight=1.0)
    second = source(tmp_path, [{"q": "w7", "a": "w8"}], "b.jsonl", weight=3.0)
    mixed = as_lists(load_sft([first, second], tokenizer, 9, padding="exclude", columns=columns))
    assert [row[0][1] for row in mixed] == ids("w5 w7 w7 w7")


def test_what_does_not_fit_is_counted(tmp_path, tokenizer):
    data = source(tmp_path, [pair("w5", "w6 w7 w8 w9"), pair("w1 w2 w3 w4", "w6"), pair("w5", "w6")])
    with pytest.warns(UserWarning, match=r"of 3 rows 1 dropped \(prompt of 5 tokens or more\), 1 responses cut"):
        examples = load_sft([data], tokenizer, 5, padding="exclude")
    assert as_lists(examples) == [
        ([BOS, *ids("w5 w6 w7 w8")], [0, 0, 1, 1, 1]),
        ([BOS, *ids("w5 w6"), EOS], [0, 0, 1, 1]),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1"}, r"needs 'messages', or texts 'prompt' and 'response'; it holds prompt \(str\)"),
        ({"prompt": 3, "response": "w1"}, r"needs .*; it holds prompt \(int\), response \(str\)"),
        ({"messages": [{"role": "user", "content": "w1"}]}, r"must end with a message of 'assistant', got .*'user'"),
        ({"messages": []}, "must end with a message of 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "tokenizer has no chat_template"),
        (pair("w1 " * 20, "w2"), "no example that fits: 1 rows, 1 of them with a prompt of 9 tokens or more"),
    ],
)
def test_unusable_rows(tmp_path, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        load_sft([source(tmp_path, [row])], tokenizer, 9)


def test_a_template_that_hides_the_prompt_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages | reverse %}{{ m['content'] }} {% endfor %}"
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(ValueError, match=r"does not start a chat of .* with its prompt"):
        load_sft([source(tmp_path, [{"messages": chat}])], tokenizer, 9)


def test_bad_arguments(tmp_path, tokenizer):
    data = source(tmp_path, [pair("w1", "w2")])
    with pytest.raises(ValueError, match="padding must be one of 'eos', 'exclude', got 'pad'"):
        load_sft([data], tokenizer, 9, padding="pad")
    with pytest.raises(ValueError, match="sources must be at least one"):
        load_sft([], tokenizer, 9)
    with pytest.raises(ValueError, match="tokenizer has no eos_token, which ends a response"):
        load_sft([data], word_tokenizer(), 9)
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(ValueError, match=r"a.txt has no rows: give .jsonl, .parquet or a saved dataset"):
        load_sft([DataSource(tmp_path / "a.txt")], tokenizer, 9)
