# SPDX-License-Identifier: Apache-2.0
"""The build's report of what ptxas said, and that no kernel spills without a line in the sources saying why."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffullama_ext

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "csrc" / "kernel_resources.py"
REPORT = Path(diffullama_ext.__file__).parent / "lib" / "kernel_resources.json"

if not SCRIPT.exists():
    pytest.skip("no sources beside the tests", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
kernel_resources = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernel_resources)

# As nvcc 13.0 prints it: a kernel without shared memory, one that spills, and one that calls a function and whose
# products are serialized.
PRINTED = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function \
'_ZN2ns1cEv'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2ns1aEv' for 'sm_80'
ptxas info    : Function properties for _ZN2ns1aEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 464 bytes cmem[0]
ptxas info    : Compile time = 149.938 ms
ptxas info    : Compiling entry function '_ZN2ns1bIfLi4EEEvT_' for 'sm_90a'
ptxas info    : Function properties for _ZN2ns1bIfLi4EEEvT_
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 392 bytes smem
ptxas info    : Compiling entry function '_ZN2ns1cEv' for 'sm_90a'
ptxas info    : Function properties for _ZN2ns1dEv
    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for _ZN2ns1cEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 96 bytes smem, 552 bytes cmem[0]
"""
SPILLING = """\
__global__ void __launch_bounds__(1024, 2) spilling(float* p) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = p[i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[i * 77] = v[63 - i] * v[(i * 7) % 64];
}
"""


def test_report_is_parsed() -> None:
    a, b, c = kernel_resources.parse(PRINTED.splitlines())
    assert (a["symbol"], a["arch"], a["registers"], a["static_shared"], a["stack"]) == ("_ZN2ns1aEv", "80", 48, 0, 0)
    assert (b["arch"], b["registers"], b["static_shared"]) == ("90a", 255, 392)
    assert (b["stack"], b["spill_stores"], b["spill_loads"]) == (8, 16, 24)
    assert (c["registers"], c["static_shared"], c["spill_stores"]) == (30, 96, 4)  # of the function that it calls
    assert [k["serialized_wgmma"] for k in (a, b, c)] == [False, False, True]


def test_only_the_report_is_kept_from_the_console() -> None:
    warning = "ptxas warning : Value of threads per SM for entry f is out of range"
    assert all(map(kernel_resources.is_report, PRINTED.splitlines()))
    assert not kernel_resources.is_report(warning)
    assert not kernel_resources.is_report("csrc/a.cu(3): error: expected a ;")


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("diffullama::(anonymous namespace)::mask_tokens_kernel(diffullama::MaskTokensParams)", "mask_tokens_kernel"),
        ("void diffullama::(anonymous namespace)::f_kernel<float, 4>(diffullama::P, bool)", "f_kernel<float, 4>"),
        ("void ns::g_kernel<(ns::Draw)1, ns::T<2> >(int (*)(int))", "g_kernel<(ns::Draw)1, ns::T<2> >"),
        ("_ZN2ns1bIfLi4EEEvT_", "_ZN2ns1bIfLi4EEEvT_"),  # no c++filt
    ],
)
def test_kernel_name(demangled: str, name: str) -> None:
    assert kernel_resources.kernel_name(demangled) == name


def test_compiler_failure_is_passed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    object_path = tmp_path / "x.o"
    script = f"import sys; sys.stderr.write({PRINTED!r} + 'oh\\n'); sys.exit(int(sys.argv[1]))"
    assert kernel_resources.main(["compile", sys.executable, "-c", script, "3", "-o", str(object_path)]) == 3
    assert capfd.readouterr().err == PRINTED + "oh\n"
    assert not Path(f"{object_path}.ptxas").exists()
    assert kernel_resources.main(["compile", sys.executable, "-c", script, "0", "-o", str(object_path)]) == 0
    assert capfd.readouterr().err == "oh\n"
    assert Path(f"{object_path}.ptxas").read_text() == PRINTED
    out = tmp_path / "out.json"
    kernel_resources.main(["collect", str(out), "--cuda", "13.0", "--archs", "80 90a", str(object_path)])
    written = json.loads(out.read_text())
    assert (written["cuda"], written["archs"], len(written["kernels"])) == ("13.0", "80 90a", 3)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_spill_is_seen(tmp_path: Path) -> None:
    """By the real compiler: 64 live values in 32 registers."""
    source = tmp_path / "x.cu"
    source.write_text(SPILLING)
    command = ["nvcc", "-arch=sm_90", "-Xptxas=-v", "-c", str(source), "-o", str(tmp_path / "x.o")]
    assert kernel_resources.main(["compile", *command]) == 0
    (kernel,) = kernel_resources.parse(Path(tmp_path / "x.o.ptxas").read_text().splitlines())
    assert kernel["registers"] == 32
    assert kernel["spill_stores"] > 0


def explained(text: str) -> set[str]:
    """Kernels of which a comment says that they spill."""
    comments = re.findall(r"//.*\bspills?\b.*", text)
    return {name for comment in comments for name in re.findall(r"\w+_kernel\b", comment)}


def test_no_kernel_spills_without_a_reason() -> None:
    if not REPORT.exists():
        pytest.skip("the CUDA library was not built")
    sources = [p for pattern in ("*.cu", "*.cuh") for p in (ROOT / "csrc").rglob(pattern)]
    allowed = {name for path in sources for name in explained(path.read_text())}
    built = json.loads(REPORT.read_text())["kernels"]
    assert built
    spilling = {
        f"{k['kernel']} on sm_{k['arch']}: {k['spill_stores']} B stored, {k['spill_loads']} B loaded"
        for k in built
        if k["spill_stores"] + k["spill_loads"] and k["kernel"].partition("<")[0] not in allowed
    }
    assert not spilling


def test_no_products_are_serialized() -> None:
    if not REPORT.exists():
        pytest.skip("the CUDA library was not built")
    assert not [k for k in json.loads(REPORT.read_text())["kernels"] if k.get("serialized_wgmma")]


def test_warpgroups_share_the_registers_that_they_count_on() -> None:
    """setmaxnreg waits for ever where a kernel starts with fewer a thread than its plan says (shares_registers)."""
    if not REPORT.exists():
        pytest.skip("the CUDA library was not built")
    kernels = [k for k in json.loads(REPORT.read_text())["kernels"] if "attention_hopper" in k["kernel"]]
    if not kernels:
        pytest.skip("not built for sm_90a")
    for k in kernels:
        four = k["kernel"].startswith("attention_hopper_forward_kernel") and ", 64>" in k["kernel"]  # warpgroups
        assert k["registers"] == 65536 // (512 if four else 384) // 8 * 8, k["kernel"]


def test_a_reason_names_its_kernel() -> None:
    assert explained("// a_kernel<double> spills 16 bytes: only tests use it\nint b_kernel;") == {"a_kernel"}


def test_the_script_runs_as_cmake_calls_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "collect", str(tmp_path / "o.json"), "--cuda", "13", "--archs", "80", "none.o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0  # no report beside the object
    assert "none.o.ptxas" in done.stderr
