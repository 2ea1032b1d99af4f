# SPDX-License-Identifier: Apache-2.0
"""One op timed and profiled on the machine at hand; `diffullama bench` and benchmarks/ are built on it."""

from .cases import CASES, Case, gradients, running
from .measurement import Measurement, Workload
from .peaks import Peaks, measure_peaks
from .profiling import KernelTime, ncu_command, nvtx_range, profile
from .timing import Timing, rotations, tensor_bytes, time_calls

__all__ = [
    "CASES",
    "Case",
    "KernelTime",
    "Measurement",
    "Peaks",
    "Timing",
    "Workload",
    "gradients",
    "measure_peaks",
    "ncu_command",
    "nvtx_range",
    "profile",
    "rotations",
    "running",
    "tensor_bytes",
    "time_calls",
]
