# SPDX-License-Identifier: Apache-2.0
"""One table of ratios: `python -m benchmarks.report [results.json ...]`, by default the newest of every machine."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEADER = ("op", "shape", "peer", "ours", "peer's", "ratio", "target", "memory", "peer's", "share", "target")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _memory(record: dict[str, Any]) -> str:
    return f"{record['peak_bytes'] / 2**20:.1f} MiB" if "peak_bytes" in record else ""


def _verdict(target: float | None, reached: bool, form: str) -> str:
    """The target with a mark where it was missed, empty where there is none."""
    return "" if target is None else f"{form.format(target)}{'' if reached else ' MISSED'}"


def _row(ours: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    ratio, is_target = peer["median_s"] / ours["median_s"], peer["contender"] == ours["against"]
    least = ours["target_speedup"] if is_target else None
    row = [ours["op"], ours["shape"], peer["contender"], _time(ours["median_s"]), _time(peer["median_s"])]
    row += [f"{ratio:.2f}x", _verdict(least, least is None or ratio >= least, ">= {}x")]
    if "peak_bytes" not in ours or "peak_bytes" not in peer:
        return [*row, "", "", "", ""]
    share = ours["peak_bytes"] / max(peer["peak_bytes"], 1)
    most = ours["target_memory"] if is_target else None
    return [*row, _memory(ours), _memory(peer), f"{share:.2f}", _verdict(most, most is None or share <= most, "<= {}")]


def table(run: dict[str, Any]) -> str:
    """The run's machine, then a row for every peer of every shape; losing ones are shown like the others."""
    records: list[dict[str, Any]] = run["records"]
    ours = {(r["op"], r["shape"]): r for r in records if r["contender"] == "ext"}
    peers = [r for r in records if r["contender"] != "ext" and (r["op"], r["shape"]) in ours]
    rows = [HEADER, *(_row(ours[r["op"], r["shape"]], r) for r in peers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    where = f"{run['name']}, {run['threads']} threads, torch {run['torch']}, commit {run['commit']}"
    return "\n".join([f"{where}; medians, ratio = peer / ours", lines[0], "-" * len(lines[0]), *lines[1:]])


def main(arguments: Sequence[str]) -> None:
    """Print the tables of the given files, or of the newest file of every machine."""
    paths = [Path(argument) for argument in arguments]
    if not paths:
        folders = sorted(path for path in RESULTS.glob("*") if path.is_dir())
        newest = (max(folder.glob("*.json"), key=lambda p: p.stat().st_mtime, default=None) for folder in folders)
        paths = [path for path in newest if path is not None]
    if not paths:
        raise SystemExit(f"no results under {RESULTS}: run `python -m pytest benchmarks --save` first")
    for path in paths:
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
