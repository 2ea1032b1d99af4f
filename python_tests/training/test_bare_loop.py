# SPDX-License-Identifier: Apache-2.0
"""examples/bare_loop.py runs, learns, and is as short as it claims to be."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "bare_loop.py"


def test_the_bare_loop_learns() -> None:
    nll = runpy.run_path(str(EXAMPLE))["main"](steps=20, anneal_steps=10)
    assert sum(nll[-5:]) < 0.8 * sum(nll[:5])


def test_the_bare_loop_stays_under_60_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
