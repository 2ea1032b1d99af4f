# SPDX-License-Identifier: Apache-2.0
"""A user's files as documents, and every way in which they can be unusable."""

import gzip
import logging
from pathlib import Path

import datasets
import pytest

from diffullama_ext.data import read_texts


@pytest.fixture(autouse=True)
def _quiet():
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", "one\ntwo\n", ["one\ntwo\n"]),
        ("no_suffix", "one", ["one"]),
        ("bom.md", "\ufeffone", ["one"]),
        ("umlaut.txt", "schön 漢字", ["schön 漢字"]),
        ("a.txt.gz", gzip.compress(b"one"), ["one"]),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("gaps.jsonl", '{"text": null}\n{"text": " "}\n{"text": "two"}\n', ["two"]),
        ("more.ndjson", '{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n', ["one", "two"]),
        ("list.json", '[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n'), ["one"]),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_reads(tmp_path, name, data, expected):
    assert list(read_texts(write(tmp_path, name, data))) == expected


def test_reads_parquet_and_saved_datasets(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "body": ["three", "four"]})
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    assert list(read_texts(tmp_path / "a.parquet")) == ["one", "two"]
    assert list(read_texts(tmp_path / "a.parquet", column="body")) == ["three", "four"]
    assert list(read_texts(tmp_path / "saved")) == ["one", "two"]
    assert list(read_texts(tmp_path / "splits")) == ["one", "two"] * 2


def test_reads_a_folder_in_order_and_leaves_out_what_it_does_not_know(tmp_path):
    for letter in "hbkdgajfcei":
        write(tmp_path, f"{letter}.txt", letter)
    write(tmp_path, "l.jsonl", '{"text": "l"}\n')
    write(tmp_path, "deep/m.py", "m")
    write(tmp_path, "empty.txt", "")
    write(tmp_path, "picture.png", b"\x89PNG")
    assert "".join(read_texts(str(tmp_path))) == "abcdmefghijkl"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", "", "no text in .*empty.txt"),
        ("blank.txt", " \n\t\n", "no text in"),
        ("empty.jsonl", "", "no text in"),
        ("blank.jsonl", "\n\n", "no text in"),
        ("null.jsonl", '{"text": null}\n', "no text in"),
        ("empty.parquet", "", "no text in"),
        ("binary.txt", b"\xff\xfe\x00", r"binary.txt is not UTF-8 text \(byte 0 is 0xff\)"),
        ("zeros.txt", b"a\0b", "zeros.txt is not text: it holds zero bytes"),
        ("cut.txt.gz", gzip.compress(b"one" * 1000)[:20], "is not readable as compressed text"),
        ("false.txt.gz", b"one", "is not readable as compressed text: Not a gzipped file"),
        ("broken.jsonl", '{"text": \n oh', "broken.jsonl is not readable as json: JSON parse error"),
        ("binary.json", b"\x00\xff", "binary.json is not readable as json"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "latin.jsonl is not readable as json"),
        ("false.jsonl.gz", b"one", "is not readable as json: Not a gzipped file"),
        ("false.parquet", b"one" * 9, "false.parquet is not readable as parquet: Parquet magic bytes not found"),
        ("column.jsonl", '{"body": "one", "id": 1}\n', "has no column 'text'; it has 'body', 'id'"),
        ("number.jsonl", '{"text": 3}\n', "column 'text' of .*number.jsonl must hold text, got int"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isprintable() and len(value) < 16 else "",
)
def test_one_line_for_what_cannot_be_used(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(read_texts(write(tmp_path, name, data)))
    assert "\n" not in str(caught.value)


def test_a_missing_path_is_noticed_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        read_texts(tmp_path / "nowhere")


def test_a_folder_without_text_names_the_suffixes(tmp_path):
    write(tmp_path, "picture.png", b"\x89PNG")
    with pytest.raises(ValueError, match=r"no file to read in .*; known suffixes: .txt .md .rst .py .jsonl"):
        list(read_texts(tmp_path))


def test_a_broken_saved_dataset_is_named(tmp_path):
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    for part in (tmp_path / "saved").glob("*.arrow"):
        part.write_bytes(b"xx")
    with pytest.raises(ValueError, match="saved is not readable as saved dataset"):
        list(read_texts(tmp_path / "saved"))


def test_a_file_that_may_not_be_read_keeps_the_systems_message(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.txt"))

    path = write(tmp_path, "a.txt", "one")
    monkeypatch.setattr("fsspec.open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*a\.txt"):
        list(read_texts(path))
