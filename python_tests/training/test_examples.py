# SPDX-License-Identifier: Apache-2.0
"""Each example runs and does what it says. (The bare loop has its own file.)"""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, **arguments: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**arguments)


def test_hf_trainer_learns(tmp_path: Path) -> None:
    losses = run("hf_trainer", steps=40, output_dir=str(tmp_path))
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_hf_trainer_splits_its_batch(tmp_path: Path) -> None:
    whole, split = (run("hf_trainer", steps=4, batch=batch, output_dir=str(tmp_path)) for batch in (16, 4))
    assert split == pytest.approx(whole, rel=1e-3)


def test_the_accelerate_loop_learns() -> None:
    losses = run("accelerate_loop", steps=40)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


@pytest.mark.parametrize("name", ["replace_loss", "replace_attention"])
def test_a_replacement_changes_no_value_and_no_gradient(name: str) -> None:
    old, new = run(name)
    assert old[0].abs().sum() > 0.1
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "accelerate_loop", "bare_loop", "hf_trainer", "replace_attention", "replace_loss"
    }  # fmt: skip
