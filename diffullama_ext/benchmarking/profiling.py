# SPDX-License-Identifier: Apache-2.0
"""A trace of one op's calls, its kernels by name, and the command that looks inside one of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

CALLS = 10


@dataclass(frozen=True)
class KernelTime:
    """One kernel (on the CPU: one operator) of the trace."""

    name: str
    count: int  # launches of all calls
    seconds: float  # of all launches

    @property
    def is_ours(self) -> bool:
        """Whether it is a CUDA kernel of this package."""
        return "diffullama::" in self.name and self.function.endswith("_kernel")

    @property
    def function(self) -> str:
        """The name without namespaces, template arguments and parameters, as ncu matches it."""
        name = self.name.replace("(anonymous namespace)::", "")
        return re.split(r"[<(]", name, maxsplit=1)[0].split()[-1].split("::")[-1]


def profile(run: Callable[[Any], Any], inputs: Any, device: torch.device, trace: Path) -> list[KernelTime]:
    """Run ``run(inputs)`` ten times under torch.profiler and write its Chrome trace; kernels by falling time."""
    on_cuda = device.type == "cuda"
    for _ in range(3):
        run(inputs)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(CALLS):
            run(inputs)
        if on_cuda:
            torch.cuda.synchronize(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    rows = []
    for event in profiler.key_averages():
        if on_cuda and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        rows.append(KernelTime(event.key, event.count, spent * 1e-6))
    return sorted(rows, key=lambda row: -row.seconds)


def ncu_command(kernels: Sequence[str], program: Sequence[str], report: str) -> str:
    """The shell line that profiles three warm launches of these kernels; clocks are left as the timings had them."""
    pattern = "|".join(re.escape(name) for name in kernels)
    ncu = ["ncu", "--set", "full", "--import-source", "yes", "--clock-control", "none"]
    ncu += ["--kernel-name-base", "function", "--kernel-name", f"regex:^({pattern})$"]
    return shlex.join([*ncu, "--launch-skip", "5", "--launch-count", "3", "--force-overwrite", "-o", report, *program])


@contextmanager
def nvtx_range(label: str) -> Iterator[None]:
    """A named range in Nsight's timeline; RuntimeError where this torch has no NVTX."""
    torch.cuda.nvtx.range_push(label)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
