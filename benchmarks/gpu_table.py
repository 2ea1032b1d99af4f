# SPDX-License-Identifier: Apache-2.0
"""The records of gpu_bench as text: every row, losing and failing ones like the others."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADER = ("op", "shape", "contender", "time", "of peak", "/ ours", "extra MB", "goal", "")
Record = Mapping[str, Any]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"


def _goal(goal: Mapping[str, float | None]) -> str:
    forms = {"ms": "<= {:g} ms", "share": ">= {:.0%}", "extra_mb": "<= {:g} MB"}
    return ", ".join(forms[name].format(value) for name, value in goal.items() if value is not None)


def _cells(record: Record, ours: Record | None) -> tuple[str, ...]:
    shape = " ".join(f"{name}={size}" for name, size in record["shape"].items())
    if record["dtype"]:
        shape += f" {record['dtype']}"
    goal = _goal(record["goal"]) if "goal" in record else ""
    verdict = ("MISSED: " + ", ".join(record["missed"]) if record["missed"] else "reached") if goal else ""
    if "error" in record:
        return record["op"], shape, record["contender"], "failed", "", "", "", goal, record["error"]
    ratio = f"{record['median_s'] / ours['median_s']:.2f}x" if ours and "error" not in ours else ""
    extra = record.get("peak_extra_bytes")
    return (
        record["op"],
        shape,
        record["contender"],
        _time(record["median_s"]),
        f"{100 * record['share']:.1f} % {record['bound']}",
        ratio,
        "" if extra is None else f"{extra / 1e6:.0f}",
        goal,
        verdict,
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell, a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def table(peaks: Mapping[str, float], records: Sequence[Record]) -> str:
    """The peaks, then a line for every contender."""
    rows, ours = [HEADER], None
    for record in records:  # ours comes first in every row
        ours = record if record["contender"] == "ext" else ours
        rows.append(_cells(record, ours))
    first = f"copies {peaks['copy_bandwidth'] / 1e12:.3f} TB/s, multiplies {peaks['gemm_rate'] / 1e12:.1f} TFLOP/s"
    return "\n".join([f"{first}; medians; extra is memory beyond inputs and results", *aligned(rows)])
