# SPDX-License-Identifier: Apache-2.0
"""Stored, mixed and streamed blocks against the documents joined one at a time."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffullama_ext import output_folder
from diffullama_ext.data import (
    BlockLayout,
    DataSource,
    MixedBlocks,
    StoredBlocks,
    TokenBlocks,
    TokenStore,
    load_blocks,
    load_train_and_heldout,
    open_store,
    stream_blocks,
    token_store,
    train_tokenizer,
    write_store,
)

TEXTS = ["a b c d\n" * 3, "x", "d c b a\n\n" * 5, "b"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a b c d\n" * 20], 270)


@pytest.fixture
def folder(tmp_path):
    """TEXTS as files, in order."""
    (tmp_path / "data").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "data" / f"{index}.txt").write_text(text)
    return tmp_path / "data"


def joined(tokenizer, *, bos=False) -> tuple[list[int], list[int], list[bool]]:
    """(ids, document of each, whether one starts there): the oracle."""
    ids, documents, starts = [], [], []
    for number, text in enumerate(TEXTS):
        new = [*([tokenizer.bos_token_id] if bos else []), *tokenizer.encode(text), tokenizer.eos_token_id]
        ids += new
        documents += [number] * len(new)
        starts += [True] + [False] * (len(new) - 1)
    return ids, documents, starts


def expected_blocks(tokenizer, length, context, isolate, bos) -> list[dict[str, list]]:
    ids, documents, starts = joined(tokenizer, bos=bos)
    blocks, at = [], 0
    while at + length <= len(ids):
        block = {"input_ids": ids[at : at + length]}
        if context == "overlap":
            block["maskable"] = [i > 0 and not (isolate and starts[at + i]) for i in range(length)]
        if isolate:
            block["document_ids"] = [d - documents[at] for d in documents[at : at + length]]
        blocks.append(block)
        at += length - (context == "overlap")
    return blocks


def as_lists(examples) -> list[dict[str, list]]:
    return [{name: value.tolist() for name, value in example.items()} for example in examples]


def every(dataset) -> list[dict[str, list]]:
    return as_lists(dataset[index] for index in range(len(dataset)))


@pytest.mark.parametrize("length", [2, 3, 7, 40])
@pytest.mark.parametrize("context", ["overlap", "none"])
@pytest.mark.parametrize(("isolate", "bos"), [(False, False), (True, False), (True, True)])
def test_blocks_are_the_joined_documents(folder, tmp_path, tokenizer, length, context, isolate, bos):
    options = {"context": context, "isolate_documents": isolate, "bos": bos}
    stored = load_blocks([DataSource(folder)], tokenizer, length, cache_dir=tmp_path / "cache", **options)
    expected = expected_blocks(tokenizer, length, context, isolate, bos)
    assert every(stored) == expected
    assert {name: value.dtype for name, value in stored[0].items()}.items() <= {
        ("input_ids", torch.int64),
        ("maskable", torch.bool),
        ("document_ids", torch.int64),
    }
    streamed = list(stream_blocks([DataSource(folder)], tokenizer, length, **options))
    assert [example.pop("sample_index") for example in streamed] == list(range(len(expected)))
    assert as_lists(streamed) == expected


@given(length=st.integers(2, 30))
def test_overlap_makes_every_token_but_the_first_a_target_once(length):
    n_tokens = 97
    store = TokenStore(np.arange(n_tokens, dtype=np.int32), np.array([n_tokens]))
    blocks = StoredBlocks(store, BlockLayout(length, "overlap"))
    targets = Counter(token for example in every(blocks) for token, able in zip(*example.values(), strict=True) if able)
    assert set(targets.values()) == {1}
    assert n_tokens - 1 - len(targets) < length - 1, "only the incomplete last block is missing"
    assert set(targets) == set(range(1, len(targets) + 1))


def test_the_cache_is_made_once_and_mapped(folder, tmp_path, tokenizer, monkeypatch):
    source, cache = DataSource(folder), tmp_path / "cache"
    first = load_blocks([source], tokenizer, 5, cache_dir=cache)
    assert isinstance(first.store.tokens, np.memmap)
    assert not first.store.tokens.flags.writeable
    monkeypatch.setattr(token_store, "tokenized", None)  # tokenising again would raise
    again = load_blocks([source], tokenizer, 5, cache_dir=cache)
    longer = load_blocks([source], tokenizer, 9, cache_dir=cache, context="none")
    assert every(again) == every(first)
    assert every(longer) == expected_blocks(tokenizer, 9, "none", False, False)
    assert len(list(cache.iterdir())) == 1


def test_other_content_tokenizer_or_bos_is_another_cache(folder, tmp_path, tokenizer):
    cache = tmp_path / "cache"

    def n_stores(tokenizer=tokenizer, bos=False) -> int:
        load_blocks([DataSource(folder)], tokenizer, 5, cache_dir=cache, bos=bos)
        return len(list(cache.iterdir()))

    assert n_stores() == 1
    assert n_stores(bos=True) == 2
    assert n_stores(train_tokenizer(["a b c d\n" * 20], 258)) == 3
    stat = (folder / "1.txt").stat()
    (folder / "1.txt").write_text("y")  # of the same size and time
    os.utime(folder / "1.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert n_stores() == 4


def test_wide_vocabularies_are_kept(tmp_path, tokenizer):
    class Wide:
        eos_token_id = 70_000

        def __len__(self):
            return 70_001

        def __call__(self, texts, **_):
            return {"input_ids": [[65_536, 1] for _ in texts]}

    write_store(tmp_path / "wide", ["a", "b"], Wide())
    assert open_store(tmp_path / "wide").tokens.tolist() == [65_536, 1, 70_000] * 2


def test_a_full_disk_leaves_nothing(folder, tmp_path, tokenizer, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_folder, "flush", full)
    cache = tmp_path / "cache"
    with pytest.raises(OSError, match="No space left on device"):
        load_blocks([DataSource(folder)], tokenizer, 5, cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_of_two_processes_the_first_ones_cache_is_kept(folder, tmp_path, tokenizer, monkeypatch):
    """It appears while ours is being written, and may be open when ours is done."""
    first, cache = tmp_path / "first", tmp_path / "cache"
    load_blocks([DataSource(folder)], tokenizer, 5, cache_dir=first)
    (made,) = first.iterdir()
    inodes = []

    def late(own, *args, **kwargs):
        inodes.append(shutil.copytree(made, cache / made.name).stat().st_ino)
        write_store(own, *args, **kwargs)

    monkeypatch.setattr(token_store, "write_store", late)
    blocks = load_blocks([DataSource(folder)], tokenizer, 5, cache_dir=cache)
    assert every(blocks) == expected_blocks(tokenizer, 5, "overlap", False, False)
    (kept,) = cache.iterdir()
    assert [kept.stat().st_ino] == inodes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda store: (store / "tokens.bin").write_bytes(b"\0\0"), r"is damaged: tokens.bin has 2 bytes, \d+ entries"),
        (lambda store: (store / "ends.bin").unlink(), "is not a store of tokens .*ends.bin.*; delete it"),
        (lambda store: (store / "store.json").write_text("{"), "is not a store of tokens"),
        (lambda store: (store / "store.json").write_text(json.dumps({"version": 1})), "is not a store of tokens"),
    ],
    ids=["cut", "missing", "not json", "other json"],
)
def test_a_damaged_cache_is_refused(folder, tmp_path, tokenizer, damage, message):
    load_blocks([DataSource(folder)], tokenizer, 5, cache_dir=tmp_path / "cache")
    (store,) = (tmp_path / "cache").iterdir()
    damage(store)
    with pytest.raises(ValueError, match=message):
        load_blocks([DataSource(folder)], tokenizer, 5, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x", "one.txt is too short: 1 documents make 2 tokens, one block needs 50"),
        (b"", "no text in .*one.txt"),
        (b"\xff\xfe\x00", "one.txt is not UTF-8 text"),
    ],
    ids=["short", "empty", "binary"],
)
def test_unusable_files(tmp_path, tokenizer, data, message):
    (tmp_path / "one.txt").write_bytes(data)
    source = DataSource(tmp_path / "one.txt")
    with pytest.raises(ValueError, match=message):
        load_blocks([source], tokenizer, 50, cache_dir=tmp_path / "cache")
    assert data == b"x" or not list((tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match=message.replace("1 documents make 2 tokens, ", "")):
        next(iter(stream_blocks([source], tokenizer, 50)))


def test_bad_arguments(folder, tmp_path, tokenizer):
    for make in (load_blocks, stream_blocks):
        with pytest.raises(ValueError, match="sources must be at least one"):
            make([], tokenizer, 5)
        with pytest.raises(ValueError, match="length must be at least 2, got 1"):
            make([DataSource(folder)], tokenizer, 1)
        with pytest.raises(ValueError, match="context must be one of 'overlap', 'none', got 'bos'"):
            make([DataSource(folder)], tokenizer, 5, context="bos")
        with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
            make([DataSource(tmp_path / "nowhere")], tokenizer, 5)
    with pytest.raises(ValueError, match=r"weight must be in \(0, inf\], got 0"):
        DataSource("a", weight=0)
    with pytest.raises(IndexError, match="block -1 of"):
        load_blocks([DataSource(folder)], tokenizer, 5, cache_dir=tmp_path)[-1]


# --- mixtures ---------------------------------------------------------------------------------------------------------


def numbers(first: int, n: int) -> TokenBlocks:
    return TokenBlocks(torch.arange(first, first + n, dtype=torch.int32)[:, None])


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_mixture_has_its_shares_and_loses_nothing(sizes, seed):
    weights = np.random.default_rng(seed).uniform(0.1, 1.0, len(sizes)).tolist()
    mixed = MixedBlocks([numbers(1000 * part, n) for part, n in enumerate(sizes)], weights)
    found = Counter(example["input_ids"][0] for example in every(mixed))
    for part, (n, weight) in enumerate(zip(sizes, weights, strict=True)):
        times = [found[1000 * part + i] for i in range(n)]
        assert min(times) >= 1
        assert max(times) - min(times) <= 1, "each in its turn"
        assert abs(sum(times) - len(mixed) * weight / sum(weights)) <= len(sizes)


def test_the_papers_mixture(folder, tmp_path, tokenizer):
    (tmp_path / "code.txt").write_text("d\n" * 2000)
    sources = [DataSource(folder, weight=0.7), DataSource(tmp_path / "code.txt", weight=0.3)]
    mixed = load_blocks(sources, tokenizer, 5, cache_dir=tmp_path / "cache")
    text = set(map(str, expected_blocks(tokenizer, 5, "overlap", False, False)))
    share = sum(str(example) in text for example in every(mixed)) / len(mixed)
    assert share == pytest.approx(0.7, abs=0.01)
    with pytest.raises(IndexError, match="example"):
        mixed[len(mixed)]


def test_a_streamed_mixture_is_drawn_by_weight_and_repeatable(tmp_path, tokenizer):
    for name in "ad":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n" * 20_000)
    sources = [DataSource(tmp_path / "a.txt", weight=7), DataSource(tmp_path / "d.txt", weight=3)]
    stream = stream_blocks(sources, tokenizer, 20, seed=3)
    first, again = list(stream), list(stream)
    assert as_lists_without_number(first) == as_lists_without_number(again)
    of_a = [tokenizer.encode("a")[0] in example["input_ids"].tolist() for example in first]
    n, p = len(of_a), 0.7
    assert abs(sum(of_a) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    stream.set_epoch(1)
    second = list(stream)
    assert second[0]["sample_index"] == 2**40
    assert as_lists_without_number(second[: len(first)]) != as_lists_without_number(first[: len(second)])


def as_lists_without_number(examples) -> list[list[int]]:
    return [example["input_ids"].tolist() for example in examples]


def test_workers_share_a_stream(folder, tokenizer):
    stream = stream_blocks([DataSource(folder)], tokenizer, 5)
    alone = {example["sample_index"]: example["input_ids"].tolist() for example in stream}
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    shared = [(example["sample_index"], example["input_ids"].tolist()) for example in loader]
    assert len(shared) == len(alone)
    assert dict(shared) == alone


def test_each_source_holds_out_its_end(folder, tmp_path, tokenizer):
    (tmp_path / "code.txt").write_text("d\n" * 300)
    sources = [DataSource(folder, weight=0.6), DataSource(tmp_path / "code.txt", weight=0.4)]
    options = {"cache_dir": tmp_path / "cache", "context": "none"}
    train, held = load_train_and_heldout(sources, tokenizer, 5, heldout=0.2, **options)
    for part in range(2):
        every_block = every(load_blocks([sources[part]], tokenizer, 5, **options))
        n_held = round(0.2 * len(every_block))
        assert as_lists(train.datasets[part]) == every_block[:-n_held]
        assert as_lists(held.datasets[part]) == every_block[-n_held:]
    one, rest = load_train_and_heldout(sources[:1], tokenizer, 5, heldout=0.999, **options)
    assert len(one) == 1
    assert len(rest) > 1
    for share in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match=r"heldout must be in \(0, 1\), got"):
            load_train_and_heldout(sources, tokenizer, 5, heldout=share, **options)
    with pytest.raises(ValueError, match=r"is too short: 1 block of 40 tokens cannot be split"):
        load_train_and_heldout(sources[:1], tokenizer, 40, heldout=0.5, **options)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_dataset_of_the_hub(tmp_path, tokenizer, monkeypatch):
    import datasets

    asked = []
    table = datasets.Dataset.from_dict({"body": [*TEXTS, None]})

    def load(path, subset, *, split, streaming):
        asked.append((path, subset, split, streaming))
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = DataSource("org/name", column="body", split="validation", subset="small")
    expected = expected_blocks(tokenizer, 5, "none", False, False)
    assert every(load_blocks([source], tokenizer, 5, cache_dir=tmp_path, context="none")) == expected
    assert set(asked) == {("org/name", "small", "validation", False)}
    streamed = list(stream_blocks([source], tokenizer, 5, context="none"))
    assert as_lists_without_number(streamed) == [block["input_ids"] for block in expected]
    assert asked[-1] == ("org/name", "small", "validation", True)
    with pytest.raises(ValueError, match=r"org/name has no column 'text'; it has 'body'"):
        load_blocks([DataSource("org/name")], tokenizer, 5, cache_dir=tmp_path)


def test_an_unknown_dataset_is_one_line(tmp_path, tokenizer, monkeypatch):
    import datasets

    def load(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        FileNotFoundError, match=r"no file, folder or dataset of the Hub 'org/name': Dataset .* on the Hub"
    ):
        load_blocks([DataSource("org/name")], tokenizer, 5, cache_dir=tmp_path)


@pytest.mark.parametrize("sources", ["data", ["data"], DataSource("data")])
def test_sources_are_a_sequence_of_data_sources(tokenizer, sources):
    with pytest.raises(TypeError, match=r"sources must be a sequence of DataSource, got "):
        load_blocks(sources, tokenizer, 5)


def test_paths_that_are_no_ids():
    assert all(DataSource(path).is_local for path in ("./a/b", "/a", "~/a", "a/b/c", str(Path.cwd())))
    assert not any(DataSource(path).is_local for path in ("org/name", "wikitext"))
