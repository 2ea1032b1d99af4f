# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU beside their peers: `python -m benchmarks.gpu_bench [--op NAME] [--out results.json]`.

The machine's copy bandwidth and matrix-product rate are measured first; every share is of one of these. Every contender
of a row gets the same inputs in the same process, and agrees with ours before it is timed.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_agreement import agree
from benchmarks.gpu_peers import Peer, peers_of
from benchmarks.gpu_table import table
from diffullama_ext.benchmarking import CASES, Case, Peaks, Workload, measure_peaks, running

OURS = "ext"
MINUTES = 7.0
Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What ours has to reach; None where nothing is asked."""

    ms: float | None = None  # at most
    share: float | None = None  # of the peak that bounds it, at least
    extra_mb: float | None = None  # of memory beyond inputs, results and a float32 weight gradient, at most


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    sizes: Mapping[str, Any]
    goal: Goal = Goal()


# Rates of the full square, in TFLOP/s, as times: 4 B H L^2 D forward, 2.5 times that backward.
_LONG = {"B": 1, "L": 8192}
_NARROW = {"B": 16, "H": 12, "Hkv": 12, "L": 1024, "D": 64}
_TOP_P = {"temperature": 0.9, "top_p": 0.9}
ROWS = (
    Row("token_stats", {"N": 4096, "V": 32000, "temperature": 0.0}, Goal(share=0.85)),
    Row("token_stats", {"N": 4096, "V": 32000, "temperature": 0.9}, Goal(share=0.85)),
    Row("token_stats", {"N": 4096, "V": 32000, **_TOP_P}, Goal(share=0.65)),
    Row("token_stats", {"N": 2048, "V": 151936, "temperature": 0.0}, Goal(share=0.85)),
    Row("token_stats", {"N": 2048, "V": 151936, "temperature": 0.9}, Goal(share=0.85)),
    Row("token_stats", {"N": 2048, "V": 151936, **_TOP_P}, Goal(share=0.65)),
    Row("token_stats", {"N": 32, "V": 151936, **_TOP_P}, Goal(ms=0.02)),
    Row("linear_shifted_cross_entropy", {"H": 4096, "V": 32000}, Goal(ms=9.6, extra_mb=350)),
    Row("linear_shifted_cross_entropy", {"H": 768, "V": 50257}, Goal(ms=3.4, extra_mb=350)),
    Row("linear_shifted_cross_entropy", {"H": 4096, "V": 151936}, Goal(share=0.9)),
    Row("mask_tokens", {"B": 64, "L": 2048}, Goal(ms=0.008)),
    Row("annealed_mask", {"L": 2048}, Goal(ms=0.005)),
    Row("annealed_mask", {"L": 16384}, Goal(ms=0.08)),
    Row("unmask", {"B": 64, "L": 2048, "amount": 32.0}, Goal(ms=0.02)),
    Row("attention", {}, Goal(ms=0.982)),  # 280
    Row("attention", {"mask": "none"}, Goal(ms=0.982)),  # what the mask costs
    Row("attention", _LONG, Goal(ms=3.66)),  # 300
    Row("attention", _NARROW, Goal(ms=0.258)),  # 200
    Row("attention", {**_NARROW, "mask": "none"}, Goal(ms=0.258)),
    Row("attention_backward", {}, Goal(ms=2.99)),  # 230
    Row("attention_backward", {"mask": "none"}, Goal(ms=2.99)),
    Row("attention_backward", _LONG, Goal(ms=10.6)),  # 260
    Row("attention_backward", _NARROW, Goal(ms=0.859)),  # 150
)
# Contenders that do something else, so that values are not compared, and those that need a GPU.
_OTHER_RESULTS = ("unweighted", "unmasked")
_GPU_ONLY = ("compiled", "cuDNN", "FlashAttention", "memory-efficient", "sm_90a")


def _case(row: Row, device: torch.device) -> Case:
    """On the CPU the sizes are replaced by small ones: a dry run of this file, not a measurement."""
    case = CASES[row.op].at(**row.sizes)
    return case if device.type == "cuda" else case.at(**case.small)


def bench_rows(
    rows: Iterable[Row],
    device: torch.device,
    *,
    seconds: float = 0.5,
    minutes: float = MINUTES,
    report: Callable[[str], None] = print,
) -> tuple[Peaks, list[Record]]:
    """Measure the peaks, then every contender of every row; what fails becomes a record with its error."""
    deadline = time.monotonic() + 60 * minutes
    peaks = measure_peaks(device)
    records: list[Record] = []
    for row in rows:
        case = _case(row, device)
        report(f"{row.op} {case.describe()}")
        goal = row.goal if device.type == "cuda" else Goal()
        records += _bench_row(case, goal, peaks, device, seconds, deadline)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch._dynamo.reset()
    return peaks, records


def _bench_row(
    case: Case, goal: Goal, peaks: Peaks, device: torch.device, seconds: float, deadline: float
) -> list[Record]:
    dtype = torch.bfloat16
    about = {"op": case.op, "shape": dict(case.shape), "dtype": "bfloat16" if case.takes_floats else None}
    contenders: dict[str, Peer] = {OURS: case.run, **peers_of(case.op, case.shape)}
    if device.type == "cpu":
        contenders = {name: run for name, run in contenders.items() if not any(part in name for part in _GPU_ONLY)}
    records: list[Record] = []
    workload = None
    for name, run in contenders.items():
        record: Record = {**about, "contender": name}
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("no time left")
            with running("ext"):
                workload = workload or Workload(case, dtype, device)
                if name != OURS and not any(part in name for part in _OTHER_RESULTS):
                    agree(case.op, case.shape, case.run(workload.sets[0]), run(workload.sets[0]))
                record |= workload.measure(run, peaks, seconds=seconds).to_dict()
        except Exception as error:  # another contender may still run
            record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if name == OURS:
            record |= {"goal": asdict(goal), "missed": missed(record, goal, case)}
        records.append(record)
    return records


def missed(record: Record, goal: Goal, case: Case) -> list[str]:
    """What of the goal our record does not reach, in words; empty where all of it is."""
    if "error" in record:
        return ["not measured"]
    out = []
    if goal.ms is not None and record["median_s"] * 1e3 > goal.ms:
        out.append(f"over {goal.ms:g} ms")
    if goal.share is not None and record["share"] < goal.share:
        out.append(f"under {100 * goal.share:g} %")
    if goal.extra_mb is not None and extra_mb(record, case.shape) > goal.extra_mb:
        out.append(f"over {goal.extra_mb:g} MB")
    return out


def extra_mb(record: Record, shape: Mapping[str, Any]) -> float:
    """Of a linear loss: peak memory without the float32 gradient of the weight."""
    return float(record["peak_extra_bytes"] - 4 * shape["V"] * shape["H"]) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a row of ours failed or missed its goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=sorted({row.op for row in ROWS}))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=0.5, help="a contender")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all")
    parser.add_argument("--out", type=Path, help="JSON of the records")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu runs the same table on the CPU")
    rows = [row for row in ROWS if given.op in (None, row.op)]
    peaks, records = bench_rows(rows, torch.device(given.device), seconds=given.seconds, minutes=given.minutes)
    if given.out:
        given.out.write_text(json.dumps({"peaks": asdict(peaks), "records": records}, indent=1) + "\n")
    print(table(asdict(peaks), records))
    return int(any(record.get("missed") or "error" in record for record in records if record["contender"] == OURS))


if __name__ == "__main__":
    raise SystemExit(main())
