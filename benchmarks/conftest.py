# SPDX-License-Identifier: Apache-2.0
"""Runs the contenders under pytest-benchmark, and prints and saves one table of ratios at the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import Bench, calls, machine, peak_extra_bytes, timed
from benchmarks.report import RESULTS, table

RECORDS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    parser.addoption("--save", action="store_true", help="write benchmarks/results/<machine>/<commit>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, pytestconfig: pytest.Config
) -> Callable[[Bench, str, str], None]:
    """compare(bench, shape, contender): agreement first, then the time, then the memory where the bench asks for it."""
    device = pytestconfig.getoption("--device")

    def measure(bench: Bench, shape: str, contender: str) -> None:
        inputs = bench.inputs(shape, device)
        run = bench.contenders[contender]
        bench.agree(bench.contenders["ext"](inputs), run(inputs))  # a wrong result gets no number
        benchmark.group = f"{bench.op} {shape}"
        benchmark(timed(run, inputs, device))
        record = {
            "op": bench.op,
            "shape": shape,
            "dimensions": {k: str(v).removeprefix("torch.") for k, v in bench.shapes[shape].items()},
            "contender": contender,
            "against": bench.against,
            "target_speedup": bench.speedup.get(shape),
            "target_memory": bench.memory.get(shape),
        }
        if benchmark.stats is not None:  # None under --benchmark-disable
            stats = benchmark.stats.stats
            times = {"median_s": stats.median, "iqr_s": stats.iqr, "min_s": stats.min}
            record |= {name: value / calls(device) for name, value in times.items()} | {"rounds": stats.rounds}
        if shape in bench.memory:
            record["peak_bytes"] = peak_extra_bytes(request.module.__name__, shape, contender, device)
        benchmark.extra_info.update(record)
        pytestconfig.stash[RECORDS].append(record)

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = [record for record in config.stash[RECORDS] if "median_s" in record]
    if not records:
        return
    run = machine(config.getoption("--device")) | {"records": records}
    terminalreporter.section("ours against eager PyTorch")
    terminalreporter.write_line(table(run))
    if config.getoption("--save"):
        path = Path(RESULTS) / run["machine"] / f"{run['commit']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=1) + "\n")
        terminalreporter.write_line(f"saved {path}")


@pytest.fixture(autouse=True)
def _repeatable_inputs() -> None:
    torch.manual_seed(0)
