# SPDX-License-Identifier: Apache-2.0
"""Medians of calls that run back to back. On CUDA the device's time, not the host's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDS = (7, 40)  # at least, at most
ROUND_SECONDS = 4e-3  # of calls in one round, so that events of microsecond resolution do not matter
MAX_CALLS = 50  # of a round: the queue of launches holds about a thousand
MAX_SETS = 64
L2_FACTOR = 3  # the sets of inputs together, in units of the L2 cache


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    low_s: float  # first quartile
    high_s: float  # third quartile
    rounds: int
    calls: int  # of a round


def tensor_bytes(value: Any) -> int:
    """Bytes of every tensor in a (nested) tuple."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, tuple | list) else 0


def rotations(n_bytes: int, device: torch.device) -> int:
    """Sets of inputs to rotate through so that none is still in the L2 cache at its turn."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MAX_SETS, -(-L2_FACTOR * l2 // max(n_bytes, 1))))


def time_calls(run: Callable[[Any], Any], sets: Sequence[Any], device: torch.device, *, seconds: float = 0.5) -> Timing:
    """Time ``run(inputs)`` over rotating ``sets`` of inputs, for about ``seconds``.

    On CUDA each round begins with a kernel that spins while the host queues the round's calls, so events around them
    see the device alone; a call that waits for the device (a hidden synchronisation) is seen with its waiting.
    """
    for inputs in (*sets, sets[0], sets[0]):  # compilation, library handles, allocator
        run(inputs)
    if device.type == "cuda":
        return _time_on_cuda(run, sets, device, seconds)
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < ROUNDS[0] or (time.perf_counter() - began < seconds and len(samples) < ROUNDS[1]):
        start = time.perf_counter()
        run(sets[len(samples) % len(sets)])
        samples.append(time.perf_counter() - start)
    return _timing(samples, 1)


def _timing(samples: Sequence[float], calls: int) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples), calls)


def _event_seconds(work: Callable[[], None], *, behind: int = 0) -> float:
    """Device time of ``work``, queued behind ``behind`` spinning cycles."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if behind:
        torch.cuda._sleep(behind)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _time_on_cuda(run: Callable[[Any], Any], sets: Sequence[Any], device: torch.device, seconds: float) -> Timing:
    with torch.cuda.device(device):
        torch.cuda._sleep(1)  # loads the kernel
        torch.cuda.synchronize()
        cycles_per_second = 1e6 / _event_seconds(lambda: torch.cuda._sleep(1_000_000))
        host_began = time.perf_counter()
        once = _event_seconds(lambda: _calls(run, sets, 0, 3)) / 3
        host_once = (time.perf_counter() - host_began) / 3
        calls = max(2, min(MAX_CALLS, round(ROUND_SECONDS / once)))
        spin = int(min(1.5 * host_once * calls + 1e-4, 0.1) * cycles_per_second)
        samples: list[float] = []
        began, turn = time.perf_counter(), 0
        while len(samples) < ROUNDS[0] or (time.perf_counter() - began < seconds and len(samples) < ROUNDS[1]):
            first = turn
            samples.append(_event_seconds(lambda: _calls(run, sets, first, calls), behind=spin) / calls)  # noqa: B023
            turn += calls
        return _timing(samples, calls)


def _calls(run: Callable[[Any], Any], sets: Sequence[Any], first: int, n: int) -> None:
    for turn in range(first, first + n):
        run(sets[turn % len(sets)])
