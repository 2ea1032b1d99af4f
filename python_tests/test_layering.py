# SPDX-License-Identifier: Apache-2.0
"""The layout's rules: imports run one way and stay light, kernels see no torch, files and functions stay readable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffullama_ext

ROOT = Path(__file__).parents[1]
PACKAGE = Path(diffullama_ext.__file__).parent
BASE = {"_library", "_version", "checks", "output_folder"}
# part -> the parts of the package it may import. BASE is open to every part but those that must stand alone.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "_library": {"_C"},
    "checks": set(),
    "output_folder": set(),
    "reference": set(),
    "schedules": set(),
    "ops": {"_library"},
    "attention_mask": {"ops", "reference"} | BASE,
    "functional": {"ops", "reference", "attention_mask"} | BASE,
    "modules": {"functional", "attention_mask"} | BASE,
    "kernel_plan": {"_library"},
    "benchmarking": {"functional", "attention_mask"} | BASE,
    "data": BASE,
    "objective": {"functional", "schedules", "attention_mask", "reference"} | BASE,  # reference for its Philox only
    "adapt_config": {"data", "objective"} | BASE,
    "integrations": {"modules", "functional", "attention_mask"} | BASE,
    "sampling": {"functional", "schedules", "attention_mask"} | BASE,
    "training": {"functional", "schedules", "attention_mask", "objective", "integrations"} | BASE,
    "evaluation": {"functional", "attention_mask", "objective", "sampling"} | BASE,
    "demo": {"functional", "schedules", "attention_mask", "objective", "integrations", "training"}
    | {"sampling", "evaluation", "data"}
    | BASE,
}
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__init__"] = {"functional", "modules", "reference", "schedules", "attention_mask", "kernel_plan"} | BASE
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
NOT_NEEDED_TO_IMPORT = ("transformers", "datasets", "tokenizers", "accelerate", "typer", "rich", "hypothesis")


def _sources() -> list[Path]:
    found = [p for folder in ("python_tests", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")]
    return sorted([*found, *PACKAGE.rglob("*.py")])


def _imported_parts(path: Path) -> set[str]:
    """The parts of diffullama_ext that one of its files imports, wherever in the file the import stands."""
    package = ("diffullama_ext", *path.relative_to(PACKAGE).parts[:-1])
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in modules if name.startswith("diffullama_ext.")}
    return parts


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = _part(path)
        assert part in ALLOWED, f"{part} is new: say in {Path(__file__).name} what it may import"
        names = _imported_parts(path) & (set(ALLOWED) | {"_C"})
        wrong += [f"{path.relative_to(PACKAGE)} imports {name}" for name in sorted(names - ALLOWED[part] - {part})]
    assert not wrong


def test_allowed_imports_have_no_cycle() -> None:
    """The table itself is a direction: parts can be ordered so that each imports only earlier ones."""
    left, done = dict(ALLOWED), {"_C"}
    while left:
        ready = {part for part, imports in left.items() if imports - {part} <= done}
        assert ready, f"a cycle among {sorted(left)}"
        done |= ready
        left = {part: imports for part, imports in left.items() if part not in ready}


def test_rule_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "reference" / "noising.py"
    path.parent.mkdir()
    path.write_text(
        "from ..functional.random import seed_tensor\nfrom .. import cli\nimport diffullama_ext.ops.noising\n"
    )
    assert _imported_parts(path) == {"functional", "cli", "ops"}
    with pytest.raises(AssertionError, match=r"reference/noising.py imports cli"):
        test_imports_run_one_way()


def test_kernels_include_no_torch() -> None:
    """*_math.h, *_kernel.h, *.cu and *.cuh compile in seconds because no torch header reaches them."""
    folder = ROOT / "csrc"
    if not folder.is_dir():
        pytest.skip("no sources beside the tests")
    kernels = [p for pattern in ("*_math.h", "*_kernel.h", "*.cu", "*.cuh") for p in folder.rglob(pattern)]
    assert kernels

    def includes(path: Path, seen: set[Path]) -> list[str]:
        found = []
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE):
            local = (path.parent / name).resolve()
            if local.exists() and local not in seen:
                found += includes(local, seen | {local})
            found.append(name)
        return found

    torch_header = re.compile(r"(^|/)(torch|ATen|c10|pybind11)(/|\.)")
    wrong = [
        f"{p.relative_to(ROOT)} reaches {n}" for p in kernels for n in includes(p, set()) if torch_header.search(n)
    ]
    assert not wrong


def _native_sources() -> list[Path]:
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in [*_sources(), *_native_sources()]}
    assert not {str(path): n for path, n in lengths.items() if n >= MAX_FILE_LINES}


def test_functions_are_short() -> None:
    """Statements, that is: signature and docstring do not count."""
    long = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines >= MAX_FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    assert not long


def test_sources_carry_a_licence() -> None:
    sources = [*_sources(), *_native_sources()]
    assert not [str(path) for path in sources if "SPDX-License-Identifier: Apache-2.0" not in path.read_text()[:60]]


def test_import_is_light_and_changes_nothing() -> None:
    """In a fresh process: no heavy dependency, no torch default changed, nothing printed."""
    script = f"""
import sys, torch
state = lambda: (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
                 torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
torch.manual_seed(5)
before = state()
import diffullama_ext
assert state() == before
heavy = sorted(set(sys.modules) & set({NOT_NEEDED_TO_IMPORT!r}))
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
