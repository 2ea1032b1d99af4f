# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries and says what is missing. Nothing else in the package touches a shared object."""

import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_LIBRARIES = Path(__file__).parent / "lib"
# Another library with the CPU ops, for tests: csrc/testing compiles the CUDA kernels for CPU tensors.
_CPU_LIBRARY = Path(os.environ.get("DIFFULLAMA_CPU_LIBRARY") or _LIBRARIES / "libdiffullama_cpu.so")


def _load(path: Path) -> str | None:
    """Load a library; returns why not, or None when it is loaded."""
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


_CPU_MISSING = _load(_CPU_LIBRARY)
SCHEMAS_LOADED = _CPU_MISSING is None
_CUDA_MISSING = (
    _CPU_MISSING  # the CUDA library implements the schemas that the CPU library defines
    or ("torch was built without CUDA" if torch.version.cuda is None else _load(_LIBRARIES / "libdiffullama_cuda.so"))
)


def host_module() -> ModuleType | None:
    """The pybind11 module ``_C`` (build info, the host RNG), or None where it was not built for this Python."""
    try:
        from . import _C  # type: ignore[attr-defined]
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
    if "DIFFULLAMA_CPU_LIBRARY" in os.environ:
        info["CPU library"] = str(_CPU_LIBRARY)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        info["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return info


def arch_is_covered(capability: tuple[int, int], built_archs: str) -> bool:
    """Whether "80 90 ..." (binaries, and PTX of the last) runs on a device: same major and minor not above, or PTX."""
    device = 10 * capability[0] + capability[1]
    archs = [int(arch.rstrip("a")) for arch in built_archs.split()]
    return device >= archs[-1] or any(arch // 10 == capability[0] and arch <= device for arch in archs)


@cache
def _cuda_reason() -> str | None:
    """Why CUDA kernels cannot run here, or None."""
    module = host_module()
    if _CUDA_MISSING or module is None or not torch.cuda.is_available():
        return _CUDA_MISSING
    archs = str(module.build_info()["built archs"])
    if archs == "none":  # _C was built alone, beside a CUDA library that it knows nothing of
        return None
    if all(arch_is_covered(torch.cuda.get_device_capability(i), archs) for i in range(torch.cuda.device_count())):
        return None
    return f"built for sm_{archs.replace(' ', ', sm_')}, which this device is not"


_KERNELS: set[tuple[str, str]] = set()  # (op, device type); a plain set, so that torch.compile traces its use


def find_kernels() -> None:
    """Note which ops have a kernel for which device; called once every kernel is registered."""
    for device_type, reason in (("cpu", _CPU_MISSING), ("cuda", _cuda_reason())):
        for name in torch._C._dispatch_get_all_op_names() if reason is None else ():
            ours = name.startswith("diffullama::")
            if ours and torch._C._dispatch_has_kernel_for_dispatch_key(name, device_type.upper()):
                _KERNELS.add((name.removeprefix("diffullama::"), device_type))


def _missing(op: str, device_type: str) -> str:
    reason = _cuda_reason() if device_type == "cuda" else _CPU_MISSING
    return f"no compiled kernel of {op} for {device_type} ({reason or 'this build lacks it'})"


@cache
def _warn_reference(op: str, device_type: str) -> None:
    warnings.warn(
        f"diffullama_ext: {_missing(op, device_type)}; the PyTorch reference runs instead. {build_info()}",
        RuntimeWarning,
        stacklevel=4,
    )


def use_kernel(op: str, device: torch.device, impl: str = "auto") -> bool:
    """Whether a call runs the compiled kernel; ``DIFFULLAMA_IMPL`` replaces ``impl='auto'`` for debugging.

    ValueError for another ``impl``; RuntimeError where "ext" is asked for and there is no kernel.
    """
    compiling = torch.compiler.is_compiling()
    if impl == "auto" and not compiling:
        impl = os.environ.get("DIFFULLAMA_IMPL", "auto")
    if impl not in ("auto", "ext", "reference"):
        raise ValueError(f"impl must be 'auto', 'ext' or 'reference', got {impl!r}")
    if impl == "reference" or (op, device.type) in _KERNELS:
        return impl != "reference"
    if impl == "ext":
        raise RuntimeError(f"impl='ext': {_missing(op, device.type)}")
    if not compiling:
        _warn_reference(op, device.type)
    return False
