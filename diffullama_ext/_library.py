# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries and says what is missing. Nothing else in the package touches a shared object."""

import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent


def _load(name: str) -> str | None:
    """Load lib<name>.so from the package; returns why not, or None when it is loaded."""
    path = _HERE / "lib" / f"lib{name}.so"
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


_CPU_MISSING = _load("diffullama_cpu")
SCHEMAS_LOADED = _CPU_MISSING is None
_CUDA_MISSING = (
    _CPU_MISSING  # the CUDA library implements the schemas that the CPU library defines
    or ("torch was built without CUDA" if torch.version.cuda is None else _load("diffullama_cuda"))
)


def host_module() -> ModuleType | None:
    """The pybind11 module ``_C`` (build info, kernel plans, the host RNG), or None where it was not built for this Python."""
    try:
        from . import _C
    except ImportError:
        return None
    return _C


def build_info() -> dict[str, object]:
    """What is compiled and what is running; ``diffullama info`` prints it."""
    module = host_module()
    info: dict[str, object] = dict(module.build_info()) if module else {}
    info |= {
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "none",
        "CPU kernels": _CPU_MISSING or "loaded",
        "CUDA kernels": _CUDA_MISSING or "loaded",
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        info["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return info


@cache
def _warn_reference(op: str, device_type: str) -> None:
    reason = _CUDA_MISSING if device_type == "cuda" else _CPU_MISSING
    warnings.warn(
        f"diffullama_ext: no compiled kernel of {op} for {device_type} ({reason or 'this build lacks it'}); "
        f"the PyTorch reference runs instead. {build_info()}",
        RuntimeWarning,
        stacklevel=4,
    )


def _has_kernel(op: str, device_type: str) -> bool:
    if _CPU_MISSING or device_type not in ("cpu", "cuda"):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"diffullama::{op}", device_type.upper())


@cache
def _resolve(op: str, device_type: str, impl: str) -> bool:
    if impl not in ("auto", "ext", "reference"):
        raise ValueError(f"impl must be 'auto', 'ext' or 'reference', got {impl!r}")
    if impl == "reference":
        return False
    if _has_kernel(op, device_type):
        return True
    if impl == "ext":
        reason = _CUDA_MISSING if device_type == "cuda" else _CPU_MISSING
        raise RuntimeError(
            f"impl='ext': no compiled kernel of {op} for {device_type} ({reason or 'this build lacks it'})"
        )
    _warn_reference(op, device_type)
    return False


def use_kernel(op: str, device: torch.device, impl: str = "auto") -> bool:
    """Whether a call runs the compiled kernel; ``DIFFULLAMA_IMPL`` replaces ``impl='auto'`` for debugging."""
    if impl == "auto" and not torch.compiler.is_compiling():
        impl = os.environ.get("DIFFULLAMA_IMPL", "auto")
    return _resolve(op, device.type, impl)
