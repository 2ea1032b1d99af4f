# SPDX-License-Identifier: Apache-2.0
"""Compiles kernel sources as C++ over the simulator. Results are kept by the hash of everything that went in."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX", "g++")
OPTIONS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fno-math-errno")
SIMULATOR = tuple(f"testing/{name}.cpp" for name in ("barriers", "fiber", "hopper", "memory", "scheduler"))
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
_RACES = ("-fsanitize=thread", "-DSIMULATOR_FINDS_RACES")
# Compiler options of the kernels and of the simulator, as in csrc/testing/CMakeLists.txt.
VARIANTS = {"plain": ((), ()), "sanitized": (_SANITIZERS, _SANITIZERS), "races": (_RACES, _RACES[1:])}

_BUILT = ROOT / ".build" / "simulator_tests"


@cache
def _has_compiler(sanitizer: tuple[str, ...]) -> bool:
    if shutil.which(CXX) is None:
        return False
    command = [CXX, *sanitizer, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", text=True, capture_output=True, check=False).returncode == 0


def _must_run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def _digest(root: Path, sources: Sequence[str], options: Sequence[str]) -> str:
    """Of the compiler's arguments and all files in the sources' folders and those that everything includes."""
    digest = hashlib.sha256(" ".join((CXX, *OPTIONS, *options, *sources)).encode())
    folders = {root / "common", root / "testing" / "cuda"} | {(root / source).parent for source in sources}
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(sources: Sequence[str], options: Sequence[str], root: Path, *inputs: Path) -> Path:
    """One compiler call, or what it made before."""
    target = _BUILT / _digest(root, sources, [*options, *(path.name for path in inputs)])
    if not target.exists():
        _BUILT.mkdir(parents=True, exist_ok=True)
        flags = [*OPTIONS, *options, "-DDIFFULLAMA_SIMULATED", f"-I{root}/testing/cuda"]
        paths = [str(root / source) for source in sources]
        with tempfile.TemporaryDirectory(dir=_BUILT) as folder:
            made = Path(folder) / "made"
            _must_run([CXX, *flags, "-x", "c++", *paths, "-x", "none", *map(str, inputs), "-o", str(made)])
            made.rename(target)
    return target


def build(sources: Sequence[str], variant: str = "plain", *, shared: bool = False, root: Path = CSRC) -> Path:
    """The path of an executable or a shared library of sources under ``root`` and the simulator's own."""
    kernels, simulator = VARIANTS[variant]
    if not _has_compiler(kernels[:1]):
        pytest.skip(" ".join(("no C++ compiler", CXX, *kernels[:1])))
    objects = [_compile([source], ["-c", *simulator], CSRC) for source in SIMULATOR]
    return _compile(sources, [*kernels, *(["-shared"] if shared else [])], root, *objects)


@cache
def _fixed_addresses() -> list[str]:
    """ThreadSanitizer of older compilers cannot place itself beside a randomised address space."""
    fixed = ["setarch", "-R"]
    works = (
        shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode == 0
    )
    return fixed if works else []


def run(program: Path, *arguments: str, seed: int = 0) -> tuple[int, str]:
    """Exit status and all output."""
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0",  # a failed launch abandons the stacks of its threads
        "TSAN_OPTIONS": "halt_on_error=1",
        "DIFFULLAMA_SIMULATED_SEED": str(seed),
    }
    command = [*_fixed_addresses(), str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    return result.returncode, result.stdout + result.stderr
