# SPDX-License-Identifier: Apache-2.0
"""How an op's kernel is launched for a shape, what it cannot avoid, and the time that follows from it."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ._library import host_module

_RESOURCES = Path(__file__).parent / "lib" / "kernel_resources.json"
_NO_DEVICE_ARCH = 90
_CUDA_TYPES = {
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
    torch.float32: "float",
    torch.float64: "double",
}


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reported when a kernel was built for one architecture."""

    kernel: str  # with its template arguments
    arch: int  # 90 for sm_90
    registers: int  # a thread
    spill_bytes: int  # stored and loaded a thread; 0 wherever performance matters
    static_shared_bytes: int


@dataclass(frozen=True)
class KernelPlan:
    """One launch of the kernel that does most of an op's work; see :func:`kernel_plan`."""

    op: str
    kernel: str  # name, as profilers show it
    grid: int  # blocks
    block: int  # threads of a block
    cluster: int  # blocks of a cluster
    shared_bytes: int  # dynamic shared memory of a block
    bytes: int  # global memory that the whole op must read or write once
    flops: int  # of matrix products
    floor_s: float | None  # the larger of bytes / copy_bandwidth and flops / gemm_rate; None where a rate was not given
    resources: tuple[KernelResources, ...]  # variants of the kernel for this architecture; empty where none was built


def kernel_plan(
    op: str,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    copy_bandwidth: float | None = None,
    gemm_rate: float | None = None,
    **shape: int,
) -> KernelPlan:
    """The launch plan of ``op`` for a shape: the very function that the launcher calls.

    >>> kernel_plan("mask_tokens", B=64, L=2048, copy_bandwidth=4.2e12)  # doctest: +SKIP

    Args:
        op: a name under ``torch.ops.diffullama``; an unknown one is answered by the list.
        device: CUDA device that it is launched on; None means the current one, or an H200 where there is none.
        dtype: of logits and hidden states, where the op has them.
        copy_bandwidth: measured bytes a second, read plus written.
        gemm_rate: measured FLOP a second of a matrix product in this dtype.
        shape: sizes by the letters of the op's documentation, N=4096, V=32000, and what chooses another kernel:
            greedy=1 (temperature 0) or truncated=1 (top-k, top-p) of token_stats, maskable=1 and p_by_token=1 of
            mask_tokens, backward=1 of shifted_cross_entropy, chunk_rows of the linear losses, transpose=1 of
            fragment_mask, tile_rows and tile_cols of mask_tile_classes. N of a loss is the number of scored tokens; the
            masks take M=1, Lq and Lk; attention B, H, Hkv, Lq, Lk (or L for both), D, causal=1 or masks=M, and
            hopper=1 for those of sm_90a: the kernel is "reference" where no kernel takes the dtype and D. A
            missing or unknown size is named in the error.

    Raises:
        ValueError: an unknown op, or sizes that do not fit it. RuntimeError: ``_C`` was not built for this Python.
    """
    module = host_module()
    if module is None:
        raise RuntimeError("kernel_plan needs the compiled module diffullama_ext._C, which this Python lacks")
    sizes = {**shape, "element_size": dtype.itemsize, "float16": dtype == torch.float16}
    arch = _NO_DEVICE_ARCH
    if device is not None or torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(device)
        sizes |= {
            "n_sm": properties.multi_processor_count,
            "shared_bytes": properties.shared_memory_per_block_optin,
            "clusters": properties.major >= 9,
        }
        arch = 10 * properties.major + properties.minor
    plan: dict[str, Any] = module.kernel_plan(op, **sizes)
    return KernelPlan(
        op=op,
        **plan,
        floor_s=_floor(plan["bytes"], plan["flops"], copy_bandwidth, gemm_rate),
        resources=_variants(_read_resources(_RESOURCES), plan["kernel"], arch, dtype),
    )


def _floor(n_bytes: int, flops: int, copy_bandwidth: float | None, gemm_rate: float | None) -> float | None:
    if copy_bandwidth is None or (flops and gemm_rate is None):
        return None
    return max(n_bytes / copy_bandwidth, flops / gemm_rate if flops and gemm_rate else 0.0)


@cache
def _read_resources(path: Path) -> tuple[KernelResources, ...]:
    """The build's report, or nothing."""
    if not path.exists():
        return ()
    return tuple(
        KernelResources(
            kernel=k["kernel"],
            arch=int(re.match(r"\d+", k["arch"])[0]),  # type: ignore[index]
            registers=k["registers"],
            spill_bytes=k["spill_stores"] + k["spill_loads"],
            static_shared_bytes=k["static_shared"],
        )
        for k in json.loads(path.read_text())["kernels"]
    )


def _variants(
    built: tuple[KernelResources, ...], kernel: str, arch: int, dtype: torch.dtype
) -> tuple[KernelResources, ...]:
    """Those of ``kernel`` that a device of ``arch`` runs; of ``dtype`` only, where the kernel is a template of it."""
    named = [r for r in built if r.kernel.partition("<")[0] == kernel.partition("<")[0]]
    fitting = [r.arch for r in named if r.arch // 10 == arch // 10 and r.arch <= arch]
    here = [r for r in named if fitting and r.arch == max(fitting)]
    typed = [r for r in here if re.search(rf"\b{_CUDA_TYPES.get(dtype)}\b", r.kernel)]
    exact = [r for r in here if r.kernel == kernel]
    return tuple(exact or typed or here)
