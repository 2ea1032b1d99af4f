# SPDX-License-Identifier: Apache-2.0
"""Progress on a terminal and off it, devices, and the table."""

import pytest
import torch
from rich.console import Console

from diffullama_ext.cli.console import pick_device, reporting, scores_table
from diffullama_ext.evaluation import DiffusionScores, Estimate


def report_two_stages() -> None:
    with reporting() as report:
        report("first", 0, 2, "")
        report("first", 2, 2, "loss 1.25")
        report("second", 1, 3, "")


def test_off_a_terminal_a_stage_is_a_line_when_it_is_through(capsys):
    report_two_stages()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("first: 2 in ")
    assert line.endswith(" s loss 1.25")


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    report_two_stages()
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("first", "2/2", "loss 1.25", "second", "1/3"):
        assert text in captured.err


def test_auto_is_a_device_that_is_here():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "meta", "cuda:99", "gpu"])
def test_other_devices_are_refused(name):
    with pytest.raises(ValueError, match="--device must be auto, cpu or cuda, got"):
        pick_device(name)


def test_the_table_fits_80_columns():
    estimate = Estimate.ratio(torch.tensor([11.1, 12.2]), torch.ones(2))
    accuracy = Estimate.ratio(torch.tensor([0.2, 0.35]), torch.ones(2))
    scores = DiffusionScores(estimate, {}, {0.15: accuracy, 0.5: accuracy, 0.85: accuracy})
    console = Console(width=80)
    with console.capture() as capture:
        console.print(scores_table("Title", {"from scratch": (estimate, scores)}))
    (row,) = [line for line in capture.get().splitlines() if "from scratch" in line]
    assert row.split() == ["from", "scratch", "11.650±0.550", "11.650±0.550", *["27.5±7.5%"] * 3]
