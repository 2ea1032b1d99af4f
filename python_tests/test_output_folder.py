# SPDX-License-Identifier: Apache-2.0
"""Folders and files written whole or not at all."""

from pathlib import Path

import pytest

from diffullama_ext import output_folder
from diffullama_ext.output_folder import write_file_at_once, written_at_once


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "run"
    with written_at_once(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert list(out.parent.iterdir()) == [out]  # nothing left beside it


def test_a_failure_leaves_what_was_there(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "old").touch()

    def write_half() -> None:
        with written_at_once(out) as folder:
            (folder / "new").touch()
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "old"]


def test_a_failure_to_move_puts_back_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / "old").touch()
    rename = Path.rename

    def refuse(path, target):
        if path.name == "new":
            raise PermissionError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), written_at_once(out):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "old"]


def test_success_replaces_what_was_there(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "old").touch()
    with written_at_once(out) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "new"]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("first, longer", "zweite Fassung: ä"):
        write_file_at_once(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["write_text", "replace"])
def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "notes.txt"
    path.write_text("kept")
    write = Path.write_text

    def refuse(self, *arguments, **options):
        if failing == "write_text":
            write(self, "half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, failing, refuse)
    with pytest.raises(OSError, match="disk full"):
        write_file_at_once(path, "new")
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_contents_are_on_the_disk_before_names(tmp_path, monkeypatch):
    """What fails in a power failure: a name that is kept of contents that are not."""
    flushed = []
    monkeypatch.setattr(output_folder, "flush", lambda path: flushed.append((path.name, (tmp_path / "run").exists())))
    with written_at_once(tmp_path / "run") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").touch()
    assert sorted(flushed) == [("file", False), ("new", False), ("part", False)]
    flushed.clear()
    write_file_at_once(tmp_path / "notes.txt", "text")
    assert len(flushed) == 1
