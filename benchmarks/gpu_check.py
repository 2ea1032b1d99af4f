# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, by one command: `python -m benchmarks.gpu_check OUT [--stage NAME]`.

OUT gets gpu_check.json (all facts), gpu_check.txt (the same as one table) and a log a stage. Each stage is a process of
its own, ends within eight minutes, and leaves what the others wrote. Exit code: 0, or 1 where a stage has problems.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages import ROOT, STAGE_SECONDS, STAGES, Context, Facts
from benchmarks.gpu_table import table

ALL = "all"
GRACE_SECONDS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--stage", choices=[*STAGES, ALL], default=ALL)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run, small shapes")
    given = parser.parse_args(arguments)
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.stage == ALL:
        for stage in STAGES:
            _run_apart(out, stage, given.device)
    else:
        _record(out, given.stage, _run_stage(out, given.stage, given.device))
    stages = _read(out)
    text = summary(stages)
    (out / "gpu_check.txt").write_text(text + "\n")
    print(text)
    wanted = STAGES if given.stage == ALL else [given.stage]
    return int(any(stages.get(stage, {"problems": ["did not run"]})["problems"] for stage in wanted))


def _run_apart(out: Path, stage: str, device: str) -> None:
    """A crash or a hang of one stage is its own problem."""
    print(f"{stage} ...", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(out), "--stage", stage, "--device", device]
    began = time.monotonic()
    before = _read(out).get(stage)
    try:
        code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=STAGE_SECONDS + GRACE_SECONDS)
        ended = f"ended with {code.returncode}"
    except subprocess.TimeoutExpired:
        ended = "took too long"
    if _read(out).get(stage) == before:
        _record(out, stage, {"problems": [f"{ended} and wrote nothing"], "seconds": time.monotonic() - began})


def _run_stage(out: Path, stage: str, device: str) -> Facts:
    began = time.monotonic()
    (out / f"{stage}.log").unlink(missing_ok=True)
    try:
        facts = STAGES[stage](Context(out, device, began + STAGE_SECONDS))
    except Exception as error:
        with (out / f"{stage}.log").open("a") as log:
            log.write(traceback.format_exc())
        facts = {"problems": [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]}
    return facts | {"seconds": round(time.monotonic() - began, 1), "device": device, "time": time.strftime("%F %T")}


def _read(out: Path) -> dict[str, Any]:
    path = out / "gpu_check.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def _record(out: Path, stage: str, facts: Facts) -> None:
    stages = _read(out) | {stage: facts}
    (out / "gpu_check.json").write_text(json.dumps({"stages": stages}, indent=1, default=str) + "\n")


def summary(stages: dict[str, Any]) -> str:
    """A line a stage with its problems under it, the machine, and the table of the benchmarks."""
    lines = []
    for stage, facts in stages.items():
        state = f"{len(facts['problems'])} problems" if facts["problems"] else "ok"
        dry = ", a dry run on the CPU" if facts.get("device") == "cpu" else ""
        lines.append(f"{stage:<9}{state} ({facts['seconds']:.0f} s{dry}){_detail(stage, facts)}")
        lines += [f"         - {problem}" for problem in facts["problems"]]
    if records := stages.get("bench", {}).get("records"):
        lines += ["", table(stages["bench"]["peaks"], records)]
    return "\n".join(lines)


def _detail(stage: str, facts: Facts) -> str:
    """The stage's facts in a few words; none where it broke off."""
    if stage == "machine" and "torch" in facts:
        gpus = [f"{gpu['name']}, driver {gpu['driver_version']}" for gpu in facts["nvidia-smi"]]
        return f": {'; '.join(gpus) or 'no GPU'}; torch {facts['torch']}"
    if stage == "build" and "missing" in facts:
        return f": built {', '.join(facts['missing']) or 'nothing, all was there'}"
    if stage == "tests" and "passed" in facts:
        return f": {facts['passed']} passed, {facts['skipped']} skipped, {len(facts['failed'])} failed"
    if stage == "sanitize" and "tools" in facts:
        return ": " + "; ".join(f"{t} {f['ours']} ours, {f['others']} others" for t, f in facts["tools"].items())
    if stage == "train" and "records" in facts:
        return ": " + "; ".join(f"{r['model']} {r['faster']:.2f}x of plain PyTorch" for r in facts["records"])
    return ""


if __name__ == "__main__":
    sys.exit(main())
