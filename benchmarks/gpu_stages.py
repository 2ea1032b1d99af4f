# SPDX-License-Identifier: Apache-2.0
"""The stages of gpu_check: each returns facts for the JSON, with what went wrong under "problems"."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_reports import read_junit, read_sanitizer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffullama_ext"
STAGE_SECONDS = 470  # of every stage, so that one fits eight minutes
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
NVIDIA_SMI = (
    *("name", "driver_version", "memory.total", "power.limit", "temperature.gpu", "mig.mode.current"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)
Facts = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """Where a stage writes, what it runs on, and until when."""

    out: Path
    device: str  # "cuda"; "cpu" is a dry run of the same steps
    deadline: float  # of time.monotonic

    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())


def _run(context: Context, log: Path, command: Sequence[str], seconds: float | None = None, **env: str) -> int:
    """Exit status of a command whose output is appended to ``log``; 124 where it took too long."""
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | env,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=min(seconds or STAGE_SECONDS, context.left()),
            )
        except subprocess.TimeoutExpired:
            return 124
        except OSError as error:  # no such program
            output.write(f"{error}\n")
            return 127
    return done.returncode


def _output(*command: str) -> str:
    """What a command prints, empty where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# --- machine ---------------------------------------------------------------------------------------------------------


def machine(context: Context) -> Facts:
    """What there is, and the rates that this GPU reaches."""
    import torch

    from diffullama_ext.benchmarking import measure_peaks

    facts: Facts = {
        "problems": [],
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "commit": _output("git", "describe", "--always", "--dirty") or "unknown",
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
        "tools": {name: shutil.which(name) for name in ("nvcc", "cmake", "ninja", "ncu", "compute-sanitizer")},
        "peers": [name for name in ("liger_kernel", "cut_cross_entropy", "triton") if find_spec(name)],
    }
    smi = _output("nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader")
    facts["nvidia-smi"] = [
        dict(zip(NVIDIA_SMI, map(str.strip, line.split(",")), strict=False)) for line in smi.splitlines()
    ]
    if context.device == "cuda" and not torch.cuda.is_available():
        facts["problems"].append("torch finds no CUDA device")
        return facts
    if context.device == "cuda":
        properties: Any = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": properties.L2_cache_size,
        }
    facts["peaks"] = asdict(measure_peaks(torch.device(context.device)))
    facts["problems"] += [
        f"{name} is not on PATH" for name in ("nvcc", "compute-sanitizer") if not facts["tools"][name]
    ]
    return facts if context.device == "cuda" else facts | {"problems": []}


# --- build -----------------------------------------------------------------------------------------------------------


def missing_targets(package: Path) -> list[str]:
    """CMake targets whose output is not there; _C is one a Python."""
    outputs = {
        "diffullama_cpu": package / "lib" / "libdiffullama_cpu.so",
        "diffullama_cuda": package / "lib" / "libdiffullama_cuda.so",
        "_C": package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
    }
    return [target for target, path in outputs.items() if not path.exists()]


def configure_command(package: Path, tree: Path, targets: Sequence[str]) -> list[str]:
    """CMake's first call. For _C alone nvcc is not needed: the CUDA library's own report says what it was built for."""
    import pybind11
    import torch

    torch_root = Path(torch.__file__).parent
    options = {
        "TORCH_INCLUDE_DIR": torch_root / "include",
        "TORCH_LIBRARY_DIR": torch_root / "lib",
        "TORCH_VERSION": torch.__version__,
        "DIFFULLAMA_OUTPUT_DIR": package,
        "DIFFULLAMA_WITH_CUDA": "ON" if "diffullama_cuda" in targets else "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    if archs := os.environ.get("DIFFULLAMA_CUDA_ARCHS"):
        options["DIFFULLAMA_CUDA_ARCHS"] = archs.replace(",", ";").replace(" ", ";")
    report = package / "lib" / "kernel_resources.json"
    if "diffullama_cuda" not in targets and report.exists():
        built = json.loads(report.read_text())
        options |= {"DIFFULLAMA_BUILT_CUDA": built["cuda"], "DIFFULLAMA_BUILT_ARCHS": built["archs"]}
    return ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), *(f"-D{k}={v}" for k, v in options.items())]


def build(context: Context) -> Facts:
    """Builds what is missing, and imports the result in a fresh process."""
    log = context.out / "build.log"
    targets = missing_targets(PACKAGE)
    facts: Facts = {"problems": [], "missing": targets}
    if targets:
        # A tree of its own: the one of setup.py is configured for everything.
        tree = ROOT / ".build" / f"gpu-check-cp{sys.version_info[0]}{sys.version_info[1]}"
        steps = (
            configure_command(PACKAGE, tree, targets),
            ["cmake", "--build", str(tree), "--parallel", str(os.cpu_count() or 1), "--target", *targets],
        )
        for step in steps:
            if code := _run(context, log, step):
                facts["problems"].append(f"{' '.join(step[:2])} ... ended with {code}; see {log.name}")
                break
    script = "import json, diffullama_ext; print(json.dumps(diffullama_ext.build_info(), default=str))"
    printed = _output(sys.executable, "-c", script)
    facts["build_info"] = json.loads(printed) if printed else {}
    wanted = ("CPU kernels", "CUDA kernels") if context.device == "cuda" else ("CPU kernels",)
    for kernels in wanted:
        if (state := facts["build_info"].get(kernels, "the package does not import")) != "loaded":
            facts["problems"].append(f"{kernels}: {state}")
    return facts


# --- tests -----------------------------------------------------------------------------------------------------------


def tests(context: Context) -> Facts:
    """The tests marked cuda; a missing device or kernel fails them."""
    log, junit = context.out / "tests.log", context.out / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "python_tests", "-m", "cuda", "-q", "--tb=short", f"--junitxml={junit}"]
    command += ["-p", "no:cacheprovider"]
    if context.device == "cuda":
        command += ["--require-cuda", "--require-ext"]
    if find_spec("xdist"):
        command += ["-n", "4"]  # compilation and host-side oracles take the time
    code = _run(context, log, command, OMP_NUM_THREADS="2")
    facts: Facts = {"problems": [], **(read_junit(junit) if junit.exists() else {"failed": {}})}
    if code == 124:
        facts["problems"].append(f"pytest did not end in {STAGE_SECONDS} s")
    elif code:
        facts["problems"].append(f"pytest ended with {code}; see {log.name}")
    facts["problems"] += [f"{name}: {why}" for name, why in facts["failed"].items()]
    return facts


# --- sanitizers ------------------------------------------------------------------------------------------------------


def sanitize(context: Context) -> Facts:
    """gpu_sanitize under each tool. Findings in kernels of cuBLAS or torch are counted, not held against us."""
    log = context.out / "sanitize.log"
    facts: Facts = {"problems": [], "tools": {}}
    program = [sys.executable, "-m", "benchmarks.gpu_sanitize", "--device", context.device]
    for n, tool in enumerate(SANITIZERS):
        report = context.out / f"{tool}.report"
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--log-file", str(report)]
        command = program if context.device == "cpu" else command + program
        share = context.left() / (len(SANITIZERS) - n)
        # Without torch's pools every tensor ends where its allocation ends.
        code = _run(context, log, command, share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = read_sanitizer(report)
        report.unlink(missing_ok=True)
        facts["tools"][tool] = {"exit": code, **found}
        if code:
            facts["problems"].append(f"{tool}: the program ended with {code}; see {log.name}")
        if found["ours"]:
            facts["problems"] += [f"{tool}: {found['ours']} findings", *found["first"]]
    return facts


# --- benchmarks ------------------------------------------------------------------------------------------------------


def bench(context: Context) -> Facts:
    """Every row of gpu_bench; a missed goal is a problem."""
    import torch

    from benchmarks.gpu_bench import OURS, ROWS, bench_rows

    on_cuda = context.device == "cuda"
    lines: list[str] = []
    peaks, records = bench_rows(
        ROWS,
        torch.device(context.device),
        seconds=0.5 if on_cuda else 0.02,
        minutes=(context.left() - 30) / 60,
        report=lines.append,
    )
    facts: Facts = {"problems": [], "peaks": asdict(peaks), "records": records}
    for record in records:
        if record["contender"] == OURS and ("error" in record or record["missed"]):
            sizes = " ".join(f"{name}={size}" for name, size in record["shape"].items())
            why = record.get("error") or ", ".join(record["missed"])
            facts["problems"].append(f"{record['op']} {sizes}: {why}")
    return facts


def train(context: Context) -> Facts:
    """Whole training steps of gpu_training; a missed goal is a problem. A dry run has no models of that size."""
    import torch

    from benchmarks.gpu_training import ROWS, compare

    rows = ROWS if context.device == "cuda" else ()
    records = [compare(row, torch.device(context.device)) for row in rows]
    problems = [f"{record['model']}: {', '.join(record['missed'])}" for record in records if record["missed"]]
    return {"problems": problems, "records": records}


STAGES = {"machine": machine, "build": build, "tests": tests, "sanitize": sanitize, "bench": bench, "train": train}
