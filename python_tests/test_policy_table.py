# SPDX-License-Identifier: Apache-2.0
"""The tasks of the policy table, by straight-line checks, and the table from a denoiser that knows the answers."""

import functools
import itertools
import json
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("benchmarks", reason="no benchmarks beside the tests")

from benchmarks import policy_table
from benchmarks.policy_table import SEED, Result, solve, table, wilson_interval
from benchmarks.policy_tasks import START, VOCAB, addition, all_grids, sudoku, train, valid_grids
from diffullama_ext.sampling import POLICIES

TASKS = [sudoku(givens=5), addition(digits=3)]


def is_valid(cells):
    """One grid, rule by rule."""
    rows = [cells[i : i + 4] for i in range(0, 16, 4)]
    columns = [cells[i::4] for i in range(4)]
    boxes = [[cells[8 * r + 2 * c + k] for k in (0, 1, 4, 5)] for r in range(2) for c in range(2)]
    return all(sorted(group) == [1, 2, 3, 4] for group in (*rows, *columns, *boxes))


def test_there_are_288_grids_and_one_changed_cell_makes_none():
    grids = all_grids()
    assert len({tuple(grid) for grid in grids.tolist()}) == 288
    assert all(is_valid(grid) for grid in grids.tolist())
    spoilt = grids.repeat_interleave(16, 0)
    spoilt[torch.arange(len(spoilt)), torch.arange(len(spoilt)) % 16] += 1
    assert not valid_grids(spoilt).any()


def test_validity_of_any_grid():
    """Latin squares, half of which break the boxes, and arbitrary cells."""
    squares = [
        sum(rows, ())
        for rows in itertools.product(itertools.permutations((1, 2, 3, 4)), repeat=4)
        if all(len(set(column)) == 4 for column in zip(*rows, strict=True))
    ]
    assert len(squares) == 576
    cells = torch.cat((torch.tensor(squares), torch.randint(1, 5, (200, 16))))
    assert valid_grids(cells).tolist() == [is_valid(grid) for grid in cells.tolist()]


def test_sudoku_puzzles():
    task, generator = TASKS[0], torch.Generator().manual_seed(0)
    seen, held_out = (task.draw(2000, flag, generator) for flag in (False, True))
    assert not set(map(tuple, seen.tolist())) & set(map(tuple, held_out.tolist()))
    assert len({tuple(row) for row in held_out.tolist()}) == 48
    hidden = task.puzzle(held_out, generator)
    assert (hidden.sum(dim=1) == 11).all()
    assert not hidden[:, 0].any()
    assert (hidden[:, 1:].float().mean(dim=0) - 11 / 16).abs().max() < 0.06
    assert task.right(held_out, held_out).all()


def test_sums():
    task, generator = TASKS[1], torch.Generator().manual_seed(0)
    for flag in (False, True):
        for row in task.draw(300, flag, generator).tolist():
            assert row[0] == START
            a, b, c = (row[1] + 10 * row[4] + 100 * row[7], row[2] + 10 * row[5] + 100 * row[8], row[3::3])
            assert a + b == c[0] + 10 * c[1] + 100 * c[2] + 1000 * row[10]
            assert ((a + b) % 7 == 0) == flag
    x0 = task.draw(4, True, generator)
    assert task.puzzle(x0, generator)[0].nonzero().flatten().tolist() == [3, 6, 9, 10]
    wrong = x0.clone()
    wrong[1, -1] = (wrong[1, -1] + 1) % 10
    assert task.right(wrong, x0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_whoever_knows_the_answer_solves_all_by_every_policy(task):
    x0 = task.draw(20, True, torch.Generator().manual_seed(SEED))

    def denoise(xt):
        assert torch.equal(xt[:, 0], x0[:, 0])
        return 50.0 * F.one_hot(x0.roll(-1, 1), VOCAB).float()

    denoise.leave_one_out = denoise
    results = list(solve(task, denoise, list(POLICIES), (2, None), 20))
    assert len(results) == 2 * len(POLICIES)
    assert all(result.right == 20 and result.nfe >= 1 for result in results)
    assert {r.nfe for r in results if r.policy == "confidence"} == {
        2.0,
        float(task.puzzle(x0, None or torch.Generator()).sum(1)[0]),
    }


def test_wilson_interval():
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for (successes, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def test_the_table_shows_every_row_with_its_interval():
    results = [
        Result("t", "a", 2, 263, 81, 2.0),
        Result("t", "a", None, 263, 263, 7.25),
        Result("t", "b:x=1", 2, 20, 0, 1),
    ]
    results.append(Result("t", "b:x=1", None, 20, 20, 4.0))
    assert table("task", results).splitlines() == [
        "| task | steps=2 | own pace |",
        "|---|---|---|",
        "| `a` | 30.8 [26, 37] @ 2.0 | 100.0 [99, 100] @ 7.2 |",
        "| `b:x=1` | 0.0 [0, 16] @ 1.0 | 100.0 [84, 100] @ 4.0 |",
    ]


def test_training_learns_and_everything_is_saved(tmp_path, monkeypatch, capsys):
    """A few steps on each task, few puzzles: the files, and a loss that falls on the grids."""
    monkeypatch.setattr(policy_table, "TRAINING_STEPS", {"sudoku": 20, "addition": 20})
    monkeypatch.setattr(policy_table, "train", functools.partial(train, batch=32))
    monkeypatch.setattr(policy_table, "N_PUZZLES", 8)
    monkeypatch.setattr(policy_table, "VARIANTS", ())
    monkeypatch.setattr(policy_table, "POLICIES", ("confidence", "wino"))
    policy_table.main(tmp_path)
    run = json.loads((tmp_path / "policies.json").read_text())
    assert len(run["results"]) == 2 * 2 * 4
    assert all(0 <= r["low"] <= r["right"] / r["n"] <= r["high"] <= 1 and r["n"] == 8 for r in run["results"])
    assert (tmp_path / "policies.md").read_text().count("`wino`") == 2
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[4] < losses[0] - 0.2  # of grids; sums take longer to begin
    assert len(losses) == 10
