# SPDX-License-Identifier: Apache-2.0
"""Accuracy against model forwards for every decoding policy: `python -m benchmarks.policy_table [OUT]`.

Trains one small model for each task (benchmarks/policy_tasks.py), then every registered policy solves the same held-out
puzzles greedily with the same seed, given several numbers of steps. OUT (by default under benchmarks/results) gets
policies.json and policies.md.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.policy_tasks import MASK_ID, Task, addition, sudoku, train
from benchmarks.report import RESULTS
from diffullama_ext.cli.policy_option import parse_policy
from diffullama_ext.sampling import POLICIES, Denoiser, ModelDenoiser, RowDenoiser, fill

TRAINING_STEPS = {"sudoku": 1000, "addition": 1400}
# Steps given; None: one a token, or as the policy likes.
STEPS: dict[str, tuple[int | None, ...]] = {"sudoku": (2, 4, 8, None), "addition": (1, 2, 4, None)}
VARIANTS = ("threshold:threshold=0.5", "threshold:threshold=0.99", "factor:factor=0.3")  # beside the defaults
N_PUZZLES, SEED = 400, 1


@dataclass(frozen=True)
class Result:
    """One policy with one number of steps on one task."""

    task: str
    policy: str
    steps: int | None
    n: int
    right: int
    nfe: float  # mean over puzzles

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.n)


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share, 95 % by default: inside [0, 1], and wide where it must be (Wilson 1927)."""
    share, scale = successes / n, 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def solve(
    task: Task,
    denoise: Denoiser | RowDenoiser,
    policies: Sequence[str],
    steps: Sequence[int | None],
    n: int,
) -> Iterator[Result]:
    """Every policy, given every number of steps, on the same ``n`` held-out puzzles."""
    generator = torch.Generator().manual_seed(SEED)
    x0 = task.draw(n, True, generator)
    masked = task.puzzle(x0, generator)
    for name in policies:
        for limit in steps:
            filled = fill(
                denoise, x0, masked, mask_id=MASK_ID, policy=parse_policy(name), steps=limit, temperature=0.0, seed=SEED
            )
            right = int(task.right(filled.xt, x0).sum())
            yield Result(task.name, name, limit, n, right, float(filled.nfe.double().mean()))


def table(about: str, results: Sequence[Result]) -> str:
    """Markdown: a policy a row, a number of steps a column; accuracy in % [95 % interval] and mean forwards."""
    columns = list(dict.fromkeys(result.steps for result in results))
    names = ["own pace" if steps is None else f"steps={steps}" for steps in columns]
    cells: dict[str, list[str]] = {}
    for result in results:
        low, high = (100 * bound for bound in result.interval())
        cell = f"{100 * result.accuracy:.1f} [{low:.0f}, {high:.0f}] @ {result.nfe:.1f}"
        cells.setdefault(result.policy, []).append(cell)
    lines = [f"| {about} | {' | '.join(names)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| `{policy}` | {' | '.join(row)} |" for policy, row in cells.items()]
    return "\n".join(lines)


def main(out: Path | None) -> None:
    """Train, solve, print and save."""
    torch.set_num_threads(1)  # these matrices are too small for more to help
    run: dict[str, Any] = machine("cpu") | {"seed": SEED, "training_steps": TRAINING_STEPS}
    begun, tables, results = time.perf_counter(), [], []
    for task in (sudoku(givens=4), addition(digits=4)):
        model = train(task, steps=TRAINING_STEPS[task.name])
        print(f"{task.name}: {N_PUZZLES} puzzles", flush=True)
        of_task = list(solve(task, ModelDenoiser(model), [*POLICIES, *VARIANTS], STEPS[task.name], N_PUZZLES))
        tables.append(table(task.about, of_task))
        print(tables[-1], flush=True)
        results += of_task
    run["seconds"], run["cpu_seconds"] = round(time.perf_counter() - begun), round(time.process_time())
    run["results"] = [asdict(r) | dict(zip(("low", "high"), r.interval(), strict=True)) for r in results]
    out = out or RESULTS / run["machine"] / "policies"
    out.mkdir(parents=True, exist_ok=True)
    (out / "policies.json").write_text(json.dumps(run, indent=1) + "\n")
    (out / "policies.md").write_text("\n\n".join(tables) + "\n")
    print(f"{run['seconds']} s, {run['cpu_seconds']} s of CPU; saved in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Accuracy against forwards for every policy.")
    parser.add_argument("out", nargs="?", type=Path, help="folder; by default this machine's results")
    main(parser.parse_args().out)
