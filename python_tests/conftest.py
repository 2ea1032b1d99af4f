# SPDX-License-Identifier: Apache-2.0
"""Which implementation and device a test runs on, and what a missing kernel or GPU does to it.

A test that takes ``impl`` and ``device`` runs as reference-cpu, reference-cuda, ext-cpu and ext-cuda; one that takes
only ``device`` runs on cpu and cuda. Tests marked ``ext`` (all ext-* cases, and those about the compiled ops as such)
are skipped while the compiled library is absent and fail under --require-ext; ``cuda`` works so with --require-cuda.
Where DIFFULLAMA_CPU_LIBRARY names the simulated library (docs/simulator.md), ext-cpu cases run the CUDA kernels.
"""

import os

import pytest
import torch
from hypothesis import settings

from diffullama_ext import build_info

CUDA_KERNELS = {
    "attention",
    "attention_hopper",
    "annealed_mask",
    "fragment_mask",
    "id_mask",
    "linear_shifted_cross_entropy",
    "linear_shifted_nll",
    "mask_tokens",
    "shifted_cross_entropy",
    "token_stats",
    "unmask",
}
NO_CPU_KERNEL = {"attention_hopper"}  # the simulated library alone runs them on CPU tensors
SIMULATED = "CPU library" in build_info()

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-ext", action="store_true", help="fail where a compiled kernel is missing, do not skip")
    parser.addoption("--require-cuda", action="store_true", help="fail where a CUDA device is missing, do not skip")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ext: needs the compiled library; skipped without one unless --require-ext")
    config.addinivalue_line("markers", "op(name): the op whose compiled kernel the ext cases of the test run")
    if build_info()["CPU kernels"] != "loaded":  # calls that name no implementation then need no warning
        os.environ.setdefault("DIFFULLAMA_IMPL", "reference")


def _case(*values: str) -> object:
    marks = [mark for value, mark in (("cuda", pytest.mark.cuda), ("ext", pytest.mark.ext)) if value in values]
    return pytest.param(*values, id="-".join(values), marks=marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = [name for name in ("impl", "device") if name in metafunc.fixturenames]
    if wanted == ["impl", "device"]:
        cases = [_case(impl, device) for impl in ("reference", "ext") for device in ("cpu", "cuda")]
        metafunc.parametrize(("impl", "device"), cases)
    elif wanted == ["device"]:
        metafunc.parametrize("device", [_case("cpu"), _case("cuda")])


def _missing_kernel(item: pytest.Item) -> tuple[str, bool] | None:
    """Why an ext test cannot run, and whether a build must have what it lacks; None where it can."""
    op = item.get_closest_marker("op")
    on_cuda = item.get_closest_marker("cuda") is not None
    kernels = "CUDA kernels" if on_cuda else "CPU kernels"
    if build_info()[kernels] != "loaded":
        return f"{kernels}: {build_info()[kernels]}", True
    if op is None:
        return None
    (name,) = op.args
    if SIMULATED and not on_cuda and name not in CUDA_KERNELS:
        return f"the simulated library has no CUDA kernel of {name}", False
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"diffullama::{name}", "CUDA" if on_cuda else "CPU"):
        return None
    required = name in CUDA_KERNELS if on_cuda else name not in NO_CPU_KERNEL
    return f"{kernels}: this build has none of {name}", required


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        reason = "no CUDA device"
        pytest.fail(reason) if item.config.getoption("--require-cuda") else pytest.skip(reason)
    if item.get_closest_marker("ext") and (missing := _missing_kernel(item)):
        reason, required = missing
        pytest.fail(reason) if required and item.config.getoption("--require-ext") else pytest.skip(reason)


@pytest.fixture
def is_simulated(impl: str, device: str) -> bool:
    """Whether a CUDA kernel runs on the CPU, thousands of times slower: statistics then take fewer draws."""
    return SIMULATED and impl == "ext" and device == "cpu"


@pytest.fixture
def reads_values(device: str, is_simulated: bool) -> bool:
    """Whether a bad value inside a tensor raises: a kernel on CUDA, or simulated, never waits to look."""
    return device == "cpu" and not is_simulated


@pytest.fixture
def attention_kernel(device: str) -> None:
    """Skips where 16-bit attention is not csrc/attention: on the CPU, unless it is simulated."""
    if device == "cpu" and not SIMULATED:
        pytest.skip("the CPU runs torch's attention")


@pytest.fixture(autouse=True)
def _repeatable_inputs() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _impl_where_no_argument_says(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """AttentionMask and the modules take no ``impl``: in a test that has one, they follow it."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and "impl" in callspec.params:
        monkeypatch.setenv("DIFFULLAMA_IMPL", callspec.params["impl"])
