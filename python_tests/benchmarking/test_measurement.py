# SPDX-License-Identifier: Apache-2.0
"""Cases, timings and shares: what is counted, and against what."""

import os
import time
from pathlib import Path

import pytest
import torch

from diffullama_ext.benchmarking import (
    CASES,
    KernelTime,
    Peaks,
    Workload,
    measure_peaks,
    ncu_command,
    profile,
    rotations,
    running,
    tensor_bytes,
    time_calls,
)
from diffullama_ext.benchmarking import timing as timing_module

CPU = torch.device("cpu")


def small(op: str):
    case = CASES[op]
    return case.at(**case.small)


@pytest.mark.parametrize("op", CASES)
def test_every_case_runs(op: str) -> None:
    case = small(op)
    inputs = case.inputs(torch.float32, CPU)
    assert tensor_bytes(case.run(inputs)) > 0
    multiplying = ("attention", "attention_backward", "linear_shifted_cross_entropy", "token_log_probs")
    assert (case.flops(inputs) > 0) == (op in multiplying)


def test_inputs_are_the_same_every_time() -> None:
    a, b = (small("token_stats").inputs(torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(a.logits, b.logits)
    assert a.logits.data_ptr() != b.logits.data_ptr()
    assert a.logits.dtype == torch.bfloat16


def test_sizes_of_a_case() -> None:
    case = CASES["token_stats"].at(N=3, top_p=0.5)
    assert (case.shape["N"], case.shape["top_p"], case.shape["V"]) == (3, 0.5, 32000)
    assert CASES["token_stats"].shape["N"] == 4096
    assert "N=3 V=32000" in case.describe()
    with pytest.raises(ValueError, match="token_stats has no size 'M'; it has N, V, temperature"):
        case.at(M=3)
    with pytest.raises(ValueError, match="rule of unmask must be like 'quota', got 3"):
        CASES["unmask"].at(rule=3)


def test_products_of_the_linear_loss() -> None:
    """Three of [scored, H] x [H, V]; position 0 is predicted by no row."""
    case = small("linear_shifted_cross_entropy")
    inputs = case.inputs(torch.float32, CPU)
    scored = int(inputs.masked[:, 1:].sum())
    assert inputs.n_scored == scored
    assert case.flops(inputs) == 6 * scored * 64 * 1000


def test_running_chooses_the_implementation_and_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFULLAMA_IMPL", "auto")
    with running("reference"):
        assert os.environ["DIFFULLAMA_IMPL"] == "reference"
    assert os.environ["DIFFULLAMA_IMPL"] == "auto"
    monkeypatch.delenv("DIFFULLAMA_IMPL")
    with pytest.raises(KeyError), running("ext"):
        raise KeyError
    assert "DIFFULLAMA_IMPL" not in os.environ


def test_time_of_a_call() -> None:
    timing = time_calls(lambda _: time.sleep(0.002), [None], CPU, seconds=0.02)
    assert 0.002 <= timing.low_s <= timing.median_s <= timing.high_s < 0.02
    assert timing.rounds >= 7
    assert timing.calls == 1


def test_sets_rotate() -> None:
    seen = []
    time_calls(seen.append, [1, 2, 3], CPU, seconds=0.0)
    assert seen[:5] == [1, 2, 3, 1, 1]  # warm-up
    assert seen[5:11] == [1, 2, 3, 1, 2, 3]


def test_enough_sets_that_the_cache_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    cuda = torch.device("cuda")
    assert rotations(10 * 2**20, CPU) == 1
    assert rotations(10 * 2**20, cuda) == 15
    assert rotations(2**30, cuda) == 2
    assert rotations(0, cuda) == rotations(1, cuda) == timing_module.MAX_SETS


def test_share_is_of_the_peak_that_bounds_the_task() -> None:
    peaks = Peaks(copy_bandwidth=1e9, gemm_rate=1e12)
    assert peaks.floor_s(10**9, 10**9) == 1.0
    assert peaks.bound(10**9, 10**9) == "copy"
    assert peaks.floor_s(10, 2 * 10**12) == 2.0
    assert peaks.bound(10, 2 * 10**12) == "gemm"
    workload = Workload(small("mask_tokens"), torch.float32, CPU)
    tokens = 8 * 2048
    assert workload.bytes == tokens * (8 + 8 + 1 + 8) + 8 * (4 + 8 + 8) + 16  # and the seed and the step
    measured = workload.measure(workload.case.run, peaks, seconds=0.0)
    assert measured.share == pytest.approx(workload.bytes / 1e9 / measured.timing.median_s)
    assert measured.to_dict()["median_s"] == measured.timing.median_s
    assert measured.peak_extra_bytes is None


def test_bytes_of_nested_tensors() -> None:
    assert tensor_bytes((torch.zeros(3), [torch.zeros(2, dtype=torch.int64)], 5, None)) == 28


def test_peaks_are_positive() -> None:
    peaks = measure_peaks(CPU)
    assert peaks.copy_bandwidth > 1e8
    assert peaks.gemm_rate > 1e8


def test_profile_writes_a_trace(tmp_path: Path) -> None:
    case = small("unmask")
    trace = tmp_path / "new" / "trace.json"
    rows = profile(case.run, case.inputs(torch.float32, CPU), CPU, trace)
    assert "traceEvents" in trace.read_text()
    assert rows == sorted(rows, key=lambda row: -row.seconds)
    assert any(row.count == 10 for row in rows)
    assert not any(row.is_ours for row in rows)  # operators of the CPU, not kernels


@pytest.mark.parametrize(
    ("name", "function", "is_ours"),
    [
        ("void diffullama::(anonymous namespace)::f_kernel<float, 4>(diffullama::P, bool)", "f_kernel", True),
        ("diffullama::(anonymous namespace)::mask_tokens_kernel(diffullama::P)", "mask_tokens_kernel", True),
        ("void at::native::vectorized_elementwise_kernel<4>(int)", "vectorized_elementwise_kernel", False),
        ("diffullama::mask_tokens", "mask_tokens", False),
        ("Memcpy DtoH (Device -> Pinned)", "DtoH", False),
    ],
)
def test_kernel_names(name: str, function: str, is_ours: bool) -> None:
    kernel = KernelTime(name, 1, 1.0)
    assert (kernel.function, kernel.is_ours) == (function, is_ours)


def test_ncu_command() -> None:
    line = ncu_command(["a_kernel", "b_kernel"], ["python", "-m", "x", "--shape", "N=3"], "out")
    assert line.startswith("ncu --set full ")
    assert "'regex:^(a_kernel|b_kernel)$'" in line
    assert "--clock-control none" in line
    assert line.endswith("-o out python -m x --shape N=3")
