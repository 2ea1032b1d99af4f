# SPDX-License-Identifier: Apache-2.0
"""What one benchmark is, how its peak memory is measured, and what machine it ran on."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
CUDA_CALLS = 20  # launched back to back before one synchronisation, so that the queue never runs dry


@dataclass(frozen=True)
class Bench:
    """One op and its peers.

    Attributes:
        op: the public function.
        shapes: id -> dimensions and options; the dtype is among them.
        make: (shape, device) -> the inputs that every contender gets.
        contenders: name -> one call on the inputs. "ext" is ours.
        agree: (our result, a peer's) -> raises where they do not compute the same.
        against: the peer that the targets speak of.
        speedup: shape id -> the ratio of medians to reach.
        memory: shape id -> the largest share of the peer's peak extra memory; also says where to measure it.
    """

    op: str
    shapes: Mapping[str, Mapping[str, Any]]
    make: Callable[[Mapping[str, Any], str], Any]
    contenders: Mapping[str, Callable[[Any], Any]]
    agree: Callable[[Any, Any], None]
    against: str
    speedup: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)

    def parametrize(self) -> pytest.MarkDecorator:
        """Every shape with every contender."""
        pairs = [(shape, name) for shape in self.shapes for name in self.contenders]
        return pytest.mark.parametrize(("shape", "contender"), pairs, ids=[f"{s}-{c}" for s, c in pairs])

    def inputs(self, shape: str, device: str) -> Any:
        """The same for every contender of a run."""
        torch.manual_seed(0)
        return self.make(self.shapes[shape], device)


def timed(run: Callable[[Any], Any], inputs: Any, device: str) -> Callable[[], None]:
    """What the clock is around; divide by :func:`calls`."""
    if device == "cpu":
        return lambda: run(inputs)

    def backlog() -> None:
        for _ in range(CUDA_CALLS):
            run(inputs)
        torch.cuda.synchronize()

    return backlog


def calls(device: str) -> int:
    """Calls of the op inside one timed call."""
    return 1 if device == "cpu" else CUDA_CALLS


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward's loss and backward's gradients, so that a contender is a whole training step."""
    return loss.detach(), *torch.autograd.grad(loss, leaves)


# --- peak memory ------------------------------------------------------------------------------------------------------


def peak_extra_bytes(module: str, shape: str, contender: str, device: str) -> int:
    """Most memory that one call holds beyond its inputs.

    On the CPU in a process of its own, from the kernel's high-water mark: it sees every allocator, ours included.
    """
    if device == "cuda":
        bench = importlib.import_module(module).BENCH
        inputs = bench.inputs(shape, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.contenders[contender](inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # A fixed threshold keeps glibc from growing it, so every freed block of 64 KiB goes back to the system.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.peak_memory", module, shape, contender]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


# --- machine ----------------------------------------------------------------------------------------------------------


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def machine(device: str) -> dict[str, Any]:
    """What a number means nothing without."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu_name()} {os.cpu_count()} cores"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "machine": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "name": name,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit.stdout.strip() or "unknown",
    }
