# SPDX-License-Identifier: Apache-2.0
"""The corpus that Python carries: what is in it, and a split that depends on names alone."""

from pathlib import Path

import pytest

from diffullama_ext.data import python_corpus
from diffullama_ext.data.corpus import is_heldout

TEXT = "x = 1\n" * 200  # 1200 characters


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """150 sources, and everything that must not be read."""
    for index in range(150):
        path = tmp_path / ("pkg" if index % 2 else ".") / f"module_{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXT + f"# {index}\n", encoding="utf-8")
    for skipped in ("test/test_a.py", "pkg/tests/b.py", "site-packages/c.py", "encodings/d.py", "_sysconfigdata_e.py"):
        (tmp_path / skipped).parent.mkdir(exist_ok=True)
        (tmp_path / skipped).write_text("never read", encoding="utf-8")
    return tmp_path


def names(documents) -> list[str]:
    return [document.name for document in documents]


def test_this_python_carries_megabytes_of_topics_and_sources():
    corpus = python_corpus()
    assert sum(len(document.text) for document in corpus.train) > 1_000_000
    assert {name.split("/")[0] for name in names(corpus.train)} == {"topic", "lib"}
    assert "lib/json/decoder.py" in names(corpus.train + corpus.heldout)
    assert not set(names(corpus.train)) & set(names(corpus.heldout))
    assert 0.02 < len(corpus.heldout) / len(corpus.train) < 0.1


def test_reads_every_source_but_tests_tables_and_installed_packages(stdlib):
    corpus = python_corpus(stdlib=stdlib)
    sources = {name for name in names(corpus.train + corpus.heldout) if name.startswith("lib/")}
    assert len(sources) == 150
    assert "never read" not in {document.text for document in corpus.train + corpus.heldout}


def test_a_missing_file_moves_no_other_to_the_other_side(stdlib):
    before = python_corpus(stdlib=stdlib, heldout_share=0.3)
    for index in range(0, 150, 3):
        for path in stdlib.rglob(f"module_{index}.py"):
            path.unlink()
    after = python_corpus(stdlib=stdlib, heldout_share=0.3)
    assert set(names(after.heldout)) < set(names(before.heldout))
    assert set(names(after.train)) < set(names(before.train))


def test_unreadable_files_are_left_out_and_named(stdlib):
    (stdlib / "latin.py").write_bytes(b"# caf\xe9\n")
    (stdlib / "dangling.py").symlink_to(stdlib / "nowhere")
    corpus = python_corpus(stdlib=stdlib)
    assert corpus.skipped == ("lib/dangling.py", "lib/latin.py")
    assert not set(corpus.skipped) & set(names(corpus.train + corpus.heldout))


def test_the_share_is_met_and_larger_shares_hold_smaller_ones():
    every = [f"lib/m{index}.py" for index in range(20_000)]
    small, large = ({name for name in every if is_heldout(name, share)} for share in (0.1, 0.25))
    assert small < large
    assert len(small) == pytest.approx(2000, abs=4 * (20_000 * 0.1 * 0.9) ** 0.5)


def test_fingerprint_is_of_texts_and_split(stdlib):
    first = python_corpus(stdlib=stdlib)
    assert first.fingerprint() == python_corpus(stdlib=stdlib).fingerprint()
    assert first.fingerprint() != python_corpus(stdlib=stdlib, heldout_share=0.5).fingerprint()
    (stdlib / "module_0.py").write_text("y = 2\n", encoding="utf-8")
    assert first.fingerprint() != python_corpus(stdlib=stdlib).fingerprint()


def test_max_chars_takes_a_part_that_mixes_topics_and_sources():
    whole, part = python_corpus(), python_corpus(max_chars=500_000)
    total = sum(len(document.text) for document in part.train + part.heldout)
    assert 500_000 <= total < 1_500_000
    assert set(names(part.train)) < set(names(whole.train))
    assert part == python_corpus(max_chars=500_000)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_rejects_a_share_that_leaves_a_side_empty(share):
    with pytest.raises(ValueError, match=r"heldout_share must be in \(0, 1\), got"):
        python_corpus(heldout_share=share)


def test_too_little_text_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("diffullama_ext.data.corpus._topics", lambda: iter(()))
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="carries too little text for a corpus: 1 documents, 6 characters"):
        python_corpus(stdlib=tmp_path)
