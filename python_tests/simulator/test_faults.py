# SPDX-License-Identifier: Apache-2.0
"""Every fault of csrc/testing/faults is noticed, and its kernel without the fault is not blamed."""

import re
from pathlib import Path

import pytest
from host_compiler import run

RACE = r"ThreadSanitizer: data race"
OVERFLOW = r"AddressSanitizer: heap-buffer-overflow"
WRONG = r": wrong: out\[\d+\] = -?\d+, not -?\d+, in launch \d"

# What says so, in each variant that must notice.
WRONG_ORDER = {"plain": WRONG, "sanitized": WRONG, "races": RACE}


def _everywhere(message: str) -> dict[str, str]:
    return {"plain": message, "sanitized": message, "races": message}


FAULTS = {
    "missing_barrier": WRONG_ORDER,
    "missing_reuse_barrier": WRONG_ORDER,
    "missing_grid_barrier": WRONG_ORDER,
    "missing_cluster_barrier": WRONG_ORDER,
    "early_cluster_exit": _everywhere(f"{WRONG}|{RACE}|rank \\d has exited"),
    "divergent_barrier": _everywhere(
        r": error: block \(0, 0, 0\) thread \(\d+, 0, 0\): divergent barrier: it is at __syncthreads"
        r" \(barriers.cu:\d+\) while \d+ threads wait at __syncthreads \(barriers.cu:\d+\)$"
    ),
    "exit_before_barrier": _everywhere(r": error: .* __syncthreads"),
    "uneven_loop": _everywhere(r": error: .* __syncthreads"),
    "deadlock": _everywhere(r": error: deadlock: .* block \(0, 0, 0\): 128 wait at named barrier .*, 128 wait at"),
    "lost_update": {"races": RACE},
    "livelock": _everywhere(r": error: .*livelock"),
    "missing_warp_barrier": WRONG_ORDER,
    "shuffle_as_barrier": {"races": RACE},
    "divergent_warp": _everywhere(
        r": error: .*divergent warp: lane \d+ is at __shfl_xor_sync .*, lane \d+ at __shfl_xor"
    ),
    "shuffle_outside_mask": _everywhere(r": error: .*lane \d+ reads lane 16, which the mask does not name"),
    "exited_lane": _everywhere(r": error: .*(exits while lane|names lanes that do not exist or have exited)"),
    "different_masks": _everywhere(r": error: .*divergent warp: .* with another mask"),
    "shifted_index": {"sanitized": OVERFLOW},
    "dropped_bound": {"sanitized": OVERFLOW},
    "shared_overflow": {"sanitized": OVERFLOW},
    "uninitialised_shared": _everywhere(WRONG),
    "missing_copy_wait": _everywhere(f"{WRONG}|{RACE}"),
    "missing_copy_barrier": WRONG_ORDER,
    "misaligned_vector": {"sanitized": r"misaligned address .* requires 16 byte alignment"},
    "shift_too_far": {"sanitized": r"shift exponent \d+ is too large"},
}


def test_every_fault_is_listed(faults: Path) -> None:
    assert run(faults)[1].split() == list(FAULTS)


@pytest.mark.parametrize("seed", range(4))
def test_good_kernels(faults: Path, seed: int) -> None:
    assert run(faults, "good", seed=seed) == (0, "")


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(faults: Path, variant: str, name: str) -> None:
    if variant not in FAULTS[name]:
        pytest.skip("undefined in this variant")
    for seed in range(2):
        status, output = run(faults, name, seed=seed)
        assert status != 0
        assert re.search(FAULTS[name][variant], output, re.MULTILINE), output
