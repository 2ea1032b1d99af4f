# SPDX-License-Identifier: Apache-2.0
"""Contenders at one case: time, share of the measured peak, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .cases import Case
from .peaks import Peaks
from .timing import Timing, rotations, tensor_bytes, time_calls


@dataclass(frozen=True)
class Measurement:
    """What one contender did. bytes and flops are the task's, the same for all: its tensors once, its products once."""

    timing: Timing
    bytes: int
    flops: int
    bound: str  # "copy" or "gemm": which peak the floor comes from
    share: float  # floor / median
    peak_extra_bytes: int | None  # most memory during one call beyond its inputs and results; CUDA only

    def to_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        row = asdict(self)
        return {**row.pop("timing"), **row}


class Workload:
    """A case's inputs, made once for all contenders: enough sets that none is in the L2 cache at its turn."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.sets = [case.inputs(dtype, device)]
        taken = tensor_bytes(self.sets[0])
        self.sets += [case.inputs(dtype, device) for _ in range(rotations(taken, device) - 1)]
        self.bytes = taken + tensor_bytes(case.run(self.sets[0]))
        self.flops = case.flops(self.sets[0])

    def measure(self, run: Callable[[Any], Any], peaks: Peaks, *, seconds: float = 0.5) -> Measurement:
        """Time one contender. The share is of the peak that bounds the task."""
        timing = time_calls(run, self.sets, self.device, seconds=seconds)
        share = peaks.floor_s(self.bytes, self.flops) / timing.median_s
        bound = peaks.bound(self.bytes, self.flops)
        return Measurement(timing, self.bytes, self.flops, bound, share, self._peak_extra(run))

    def _peak_extra(self, run: Callable[[Any], Any]) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        results = run(self.sets[0])
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before - tensor_bytes(results)
