# SPDX-License-Identifier: Apache-2.0
"""`diffullama bench`: one op on this machine: its time, its share of the measured peak, its kernels."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import pick_device
from .errors import BadInput, checking_input

if TYPE_CHECKING:
    import torch

    from ..benchmarking import Case, KernelTime

DTYPES = ("bfloat16", "float16", "float32")
Record = dict[str, Any]


def bench(
    op: Annotated[str, typer.Option(help="mask_tokens, token_stats, ...; any other name lists them.")],
    shape: Annotated[str, typer.Option(help="Sizes other than the default: N=4096,V=32000,top_p=0.9.")] = "",
    dtype: Annotated[str, typer.Option(help="Of logits and hidden states; bfloat16 on CUDA, else float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    impl: Annotated[str, typer.Option(help="auto, ext or reference.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to measure for.")] = 0.5,
    profile: Annotated[bool, typer.Option("--profile", help="Trace it; print kernels and an ncu command.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Where --profile writes its Chrome trace.")] = None,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="An NVTX range around every call.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time one op on this machine, as a share of its measured copy bandwidth or matrix-product rate.

    Losses run forward and backward. Without --shape a GPU gets a training-sized shape and a CPU a small one.
    """
    from ..benchmarking import running

    with checking_input():
        where = pick_device(device)
        case = _case(op, shape, where)
        element = _dtype(dtype, where)
        if nvtx and where.type != "cuda":
            raise BadInput("--nvtx needs a CUDA device")
        if impl not in ("auto", "ext", "reference"):
            raise BadInput(f"--impl must be auto, ext or reference, got {impl!r}")
    path = (trace or Path(f"diffullama-{op}.trace.json")) if profile else None
    options = {"--op": op, "--shape": shape, "--dtype": dtype, "--impl": impl, "--device": where.type}
    with running(impl):
        record = _measure(case, element, where, seconds, nvtx, path, options)
    typer.echo(json.dumps(record, indent=2) if as_json else "\n".join(_lines(record)))


# --- what was asked for ----------------------------------------------------------------------------------------------


def parse_shape(text: str) -> dict[str, int | float | str]:
    """ "N=4096,top_p=0.9,rule=quota" as sizes; ValueError for anything else."""
    sizes: dict[str, int | float | str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if not (equals and name and value):
            raise ValueError(f"--shape must be like N=4096,V=32000, got {item!r} in it")
        sizes[name] = int(value) if value.isdecimal() else _number_or_word(value)
    return sizes


def _number_or_word(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _case(op: str, shape: str, device: torch.device) -> Case:
    from ..benchmarking import CASES

    if op not in CASES:
        raise ValueError(f"--op must be one of {', '.join(CASES)}, got {op!r}")
    case = CASES[op]
    if device.type == "cpu":
        case = case.at(**case.small)
    return case.at(**parse_shape(shape))


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


# --- the measurement -------------------------------------------------------------------------------------------------


def _measure(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    nvtx: bool,
    trace: Path | None,
    options: dict[str, str],
) -> Record:
    import torch

    from ..benchmarking import Workload, measure_peaks, nvtx_range, profile

    def in_range(inputs: Any) -> Any:
        with nvtx_range(f"{case.op} {case.describe()}"):
            return case.run(inputs)

    run: Callable[[Any], Any] = in_range if nvtx else case.run
    peaks = measure_peaks(device)
    workload = Workload(case, dtype, device)
    record: Record = {
        "op": case.op,
        "shape": dict(case.shape),
        "dtype": str(dtype).removeprefix("torch.") if case.takes_floats else None,
        "impl": options["--impl"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "peaks": asdict(peaks),
        **workload.measure(run, peaks, seconds=seconds).to_dict(),
        "plan": _plan(case, dtype, workload.sets[0], device),
    }
    if trace is not None:
        kernels = profile(run, workload.sets[0], device, trace)
        record |= {"kernels": [asdict(k) for k in kernels], "trace": str(trace), "ncu": _ncu(kernels, options, record)}
    return record


def _plan(case: Case, dtype: torch.dtype, inputs: Any, device: torch.device) -> Record | None:
    """None where the op has no plan, or _C was not built."""
    from ..kernel_plan import kernel_plan

    if case.plan is None:
        return None
    where = device if device.type == "cuda" else None
    try:
        return asdict(kernel_plan(case.op, device=where, dtype=dtype, **case.plan(inputs)))
    except RuntimeError:
        return None


def _ncu(kernels: list[KernelTime], options: dict[str, str], record: Record) -> str | None:
    """The command for the op's own kernels; for the planned one where the trace (of a CPU) has none."""
    from ..benchmarking import ncu_command

    names = list(dict.fromkeys(kernel.function for kernel in kernels if kernel.is_ours))
    if not names and record["plan"] is not None:
        names = [re.split(r"[<(]", record["plan"]["kernel"])[0]]
    given = [word for option, value in options.items() if value and option != "--device" for word in (option, value)]
    program = [sys.executable, "-m", "diffullama_ext.cli.main", "bench", *given, "--device", "cuda", "--seconds", "0"]
    return ncu_command(names, program, f"diffullama-{record['op']}") if names else None


# --- what is shown ---------------------------------------------------------------------------------------------------


def _lines(r: Record) -> list[str]:
    peak = {"copy": "copy bandwidth", "gemm": "matrix-product rate"}[r["bound"]]
    rate = f"{r['bytes'] / r['median_s'] / 1e9:.4g} GB/s"
    if r["bound"] == "gemm":
        rate = f"{r['flops'] / r['median_s'] / 1e12:.4g} TFLOP/s"
    copy, gemm = r["peaks"]["copy_bandwidth"] / 1e9, r["peaks"]["gemm_rate"] / 1e12
    rows = {
        "op": f"{r['op']}, impl {r['impl']}",
        "shape": " ".join(f"{k}={v}" for k, v in r["shape"].items()) + (f" {r['dtype']}" if r["dtype"] else ""),
        "device": f"{r['device']}, torch {r['torch']}; copies {copy:.4g} GB/s, multiplies {gemm:.4g} TFLOP/s",
        "time": f"{_time(r['median_s'])} median, quartiles {_time(r['low_s'])} and {_time(r['high_s'])}, "
        f"{r['rounds']} rounds of {r['calls']}",
        "rate": f"{rate}, {100 * r['share']:.3g} % of the {peak}",
    }
    if r["peak_extra_bytes"] is not None:
        rows["memory"] = f"{r['peak_extra_bytes'] / 1e6:.4g} MB at most beyond inputs and results"
    if r["plan"] is not None:
        rows |= _plan_rows(r["plan"])
    lines = [f"{name:<8}{text}" for name, text in rows.items()]
    if "kernels" in r:
        lines += ["", "kernels of the trace, by time:"]
        lines += [f"  {_time(k['seconds']):>10}  {k['count']:>5}x  {k['name'][:90]}" for k in r["kernels"][:8]]
        lines += [f"trace: {r['trace']} (chrome://tracing, ui.perfetto.dev)", f"ncu:   {r['ncu']}"]
    return lines


def _plan_rows(plan: Record) -> dict[str, str]:
    cluster = f", clusters of {plan['cluster']}" if plan["cluster"] > 1 else ""
    shared = f", {plan['shared_bytes']} B shared" if plan["shared_bytes"] else ""
    rows = {"plan": f"{plan['kernel']}, {plan['grid']} blocks of {plan['block']}{cluster}{shared}"}
    if plan["resources"]:
        registers = [r["registers"] for r in plan["resources"]]
        spilled = max(r["spill_bytes"] for r in plan["resources"])
        rows["built"] = f"{min(registers)} to {max(registers)} registers a thread, {spilled} B spilled"
    return rows


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} us"
