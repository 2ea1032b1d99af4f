# SPDX-License-Identifier: Apache-2.0
"""Finds torch and calls CMake; sources, flags and architectures are in CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WITH_CUDA = {"": "AUTO", "1": "ON", "0": "OFF"}


class CMakeBuild(build_ext):
    """Builds libdiffullama_cpu, libdiffullama_cuda (where nvcc is found) and _C into the package."""

    def run(self) -> None:
        import pybind11
        import torch

        torch_root = Path(torch.__file__).parent
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "diffullama_ext"
        # The build tree stays between calls: Ninja compiles what changed. One per Python, since _C is.
        own_tree = ROOT / ".build" / f"cp{sys.version_info[0]}{sys.version_info[1]}"
        tree = Path(os.environ.get("DIFFULLAMA_BUILD_DIR", own_tree))
        with_cuda = os.environ.get("DIFFULLAMA_WITH_CUDA", "")
        if with_cuda not in WITH_CUDA:
            raise SystemExit(f"DIFFULLAMA_WITH_CUDA must be 0, 1 or empty, got {with_cuda!r}")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "TORCH_INCLUDE_DIR": torch_root / "include",
            "TORCH_LIBRARY_DIR": torch_root / "lib",
            "TORCH_VERSION": torch.__version__,
            "DIFFULLAMA_OUTPUT_DIR": package,
            "DIFFULLAMA_WITH_CUDA": WITH_CUDA[with_cuda],
            "DIFFULLAMA_WERROR": os.environ.get("DIFFULLAMA_WERROR", "0"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if archs := os.environ.get("DIFFULLAMA_CUDA_ARCHS"):
            options["DIFFULLAMA_CUDA_ARCHS"] = archs.replace(",", ";").replace(" ", ";")
        defines = [f"-D{key}={value}" for key, value in options.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), *defines], check=True)
        subprocess.run(["cmake", "--build", str(tree), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "diffullama_ext"
        return [str(path) for pattern in ("lib/*.so", "lib/*.json", "_C*.so") for path in package.glob(pattern)]


setup(ext_modules=[Extension("diffullama_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
