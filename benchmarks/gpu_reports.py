# SPDX-License-Identifier: Apache-2.0
"""What pytest and compute-sanitizer left behind, as facts."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

OURS = "diffullama::"  # the namespace of every kernel here
SHOWN = 20


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a pytest run, what failed and why in one line, and the slowest tests."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = {}
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed[_name(case)] = " ".join((problem.get("message") or problem.text or "").split())[:300]
    skipped = sum(case.find("skipped") is not None for case in cases)
    slowest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:10]
    return {
        "tests": len(cases),
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "slowest": {_name(case): float(case.get("time", 0)) for case in slowest},
    }


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '')}::{case.get('name', '')}"


def sanitizer_findings(lines: Iterable[str]) -> Iterator[str]:
    """Each error or hazard of a compute-sanitizer log as one line: what, and where on the device."""
    finding: list[str] = []
    for line in (*lines, "========= "):
        text = line.removeprefix("=========")
        starts = line.startswith("=========") and re.match(r" \S", text) is not None
        if (starts or not text.strip()) and finding:
            yield " | ".join(finding)
            finding = []
        if starts and not re.match(r" (COMPUTE-SANITIZER|[A-Z]+ SUMMARY|Running|Target|This tool)", text):
            finding = [text.strip()]
        elif finding and line.startswith("=========     ") and "Host Frame" not in line and "backtrace" not in line:
            finding.append(text.strip())


def read_sanitizer(path: Path) -> dict[str, Any]:
    """How many findings name our kernels, how many others (cuBLAS, torch), and the first of ours."""
    found = list(sanitizer_findings(path.read_text(errors="replace").splitlines())) if path.exists() else []
    ours = [finding for finding in found if OURS in finding]
    return {"ours": len(ours), "others": len(found) - len(ours), "first": ours[:SHOWN] or found[:3]}
