# SPDX-License-Identifier: Apache-2.0
"""What ptxas says of every kernel, kept by the build as lib/kernel_resources.json: registers, spills, shared memory,
and whether it waits for each wgmma by itself.

CMake calls it twice: ``compile`` in front of nvcc, which moves ptxas' report from the console to a file beside the
object, and ``collect``, which turns these files into the JSON that kernel_plan and the spill test read.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPORT_SUFFIX = ".ptxas"
ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\S+)' for 'sm_(?P<arch>\w+)'")
# Of the entry itself, and of the functions that it calls without inlining.
PROPERTIES = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"ptxas info\s*: Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Said before the entries, as information only.
SERIALIZED = re.compile(r"wgmma.mma_async instructions are serialized .* in the function '(?P<symbol>\S+)'")


def is_report(line: str) -> bool:
    """Whether ptxas wrote the line because of -v; its warnings and errors are not the report."""
    return line.startswith("ptxas info") or PROPERTIES.fullmatch(line.strip()) is not None


def parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A record for every kernel of every architecture; names are mangled."""
    kernel: dict[str, Any] = {}
    serialized = set()
    for line in lines:
        if found := SERIALIZED.search(line):
            serialized.add(found["symbol"])
        elif found := ENTRY.search(line):
            kernel = {"symbol": found["symbol"], "arch": found["arch"], "stack": 0, "spill_stores": 0, "spill_loads": 0}
            kernel["serialized_wgmma"] = found["symbol"] in serialized
        elif kernel and (found := PROPERTIES.search(line)):
            kernel["stack"] += int(found["stack"])
            kernel["spill_stores"] += int(found["stores"])
            kernel["spill_loads"] += int(found["loads"])
        elif kernel and (found := USED.search(line)):
            kernel["registers"] = int(found["registers"])
            kernel["static_shared"] = int(shared[1]) if (shared := SHARED.search(line)) else 0
            yield kernel
            # What follows until the next entry belongs to functions that this one calls.


def demangled(symbols: Sequence[str]) -> list[str]:
    """As c++filt says; the symbols themselves where there is none."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not symbols:
        return list(symbols)
    done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def kernel_name(demangled_name: str) -> str:
    """ "void ns::(anonymous namespace)::f_kernel<float, 4>(ns::Params)" -> "f_kernel<float, 4>"."""
    name = demangled_name.replace("(anonymous namespace)::", "")
    depth = 0
    for end in range(len(name) - 1, -1, -1):  # cut the parameter list, the last balanced pair of parentheses
        depth += (name[end] == ")") - (name[end] == "(")
        if name[end] == "(" and depth == 0:
            name = name[:end]
            break
    head, bracket, arguments = name.partition("<")
    return head.split()[-1].split("::")[-1] + bracket + arguments


def compile_and_keep(command: Sequence[str]) -> int:
    """Run a compiler, put ptxas' report beside its object; the exit status."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if done.returncode or not is_report(line))
    if done.returncode == 0 and "-o" in command:
        path = Path(command[command.index("-o") + 1] + REPORT_SUFFIX)
        path.write_text("".join(line for line in lines if is_report(line)))
    return done.returncode


def collect(out: Path, cuda: str, archs: str, objects: Sequence[str]) -> None:
    """One JSON of the reports beside ``objects``."""
    kernels = [k for path in objects for k in parse(Path(path + REPORT_SUFFIX).read_text().splitlines())]
    for kernel, name in zip(kernels, demangled([k.pop("symbol") for k in kernels]), strict=True):
        kernel["kernel"] = kernel_name(name)
    kernels.sort(key=lambda k: (k["kernel"], k["arch"]))
    out.write_text(json.dumps({"cuda": cuda, "archs": archs, "kernels": kernels}, indent=1) + "\n")


def main(arguments: Sequence[str]) -> int:
    """Exit status of ``compile COMPILER...`` or ``collect OUT --cuda V --archs "80 90" OBJECT...``."""
    if arguments[:1] == ["compile"]:
        return compile_and_keep(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["collect"])
    parser.add_argument("out", type=Path)
    parser.add_argument("objects", nargs="+")
    parser.add_argument("--cuda", required=True)
    parser.add_argument("--archs", required=True)
    given = parser.parse_args(arguments)
    collect(given.out, given.cuda, given.archs, given.objects)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
