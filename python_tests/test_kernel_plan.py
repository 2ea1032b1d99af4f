# SPDX-License-Identifier: Apache-2.0
"""kernel_plan: sizes worked out by hand, the floor, errors, and the compiled variants."""

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from diffullama_ext import KernelPlan as Plan
from diffullama_ext import _library, kernel_plan
from diffullama_ext.ops import attention, attention_hopper

pytestmark = pytest.mark.ext

H200 = {"n_sm": 132, "shared_bytes": 232448, "clusters": 1}


def plan(op: str, **arguments: Any) -> Plan:
    return kernel_plan(op, **({} if torch.cuda.is_available() else H200) | arguments)


def test_mask_tokens() -> None:
    """64 x 2048: 32768 items of 4 positions, 256 a block; x0 8, xt 8, masked 1, positions 8 bytes a token."""
    got = plan("mask_tokens", B=64, L=2048)
    assert (got.kernel, got.grid, got.block, got.cluster) == ("mask_tokens_kernel", 128, 256, 1)
    assert got.bytes == 64 * 2048 * 25 + 64 * (8 + 8 + 4)
    assert plan("mask_tokens", B=64, L=2048, maskable=1).bytes - got.bytes == 64 * 2048
    assert plan("mask_tokens", B=64, L=2048, p_by_token=1).bytes - got.bytes == 4 * (64 * 2048 - 64)
    assert plan("mask_tokens", B=3, L=5).grid == 1  # an item at the end of a row is not shared with the next


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plan is that of this machine's GPU")
def test_grid_barriers_keep_every_block_resident() -> None:
    assert plan("mask_tokens", B=4096, L=4096).grid == 4 * 132
    assert plan("mask_tokens", B=4096, L=4096, n_sm=3).grid == 12


def test_linear_loss_is_three_products() -> None:
    N, H, V = 8192, 4096, 32000
    got = plan("linear_shifted_cross_entropy", N=N, H=H, V=V, copy_bandwidth=4.2e12, gemm_rate=770e12)
    assert got.flops == 6 * N * H * V
    assert got.floor_s == pytest.approx(6 * N * H * V / 770e12)
    assert got.grid == 4160  # rows of a quarter GiB of bfloat16 logits, whole 64s
    assert plan("linear_shifted_cross_entropy", N=100, H=H, V=V).grid == 100
    assert plan("linear_shifted_cross_entropy", N=N, H=H, V=V, chunk_rows=512).grid == 512
    assert plan("linear_shifted_cross_entropy", N=N, H=H, V=V, dtype=torch.float32).grid == 2048


def test_token_stats_reads_the_logits_once() -> None:
    N, V = 4096, 32000
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        assert N * V * size <= plan("token_stats", N=N, V=V, dtype=dtype).bytes <= N * V * size + 64 * N
    kernels = {plan("token_stats", N=N, V=V, **flags).kernel for flags in ({}, {"greedy": 1}, {"truncated": 1})}
    assert len(kernels) == 3


def test_few_long_rows_take_clusters() -> None:
    few = plan("token_stats", N=32, V=151936, truncated=1)
    assert few.cluster > 1
    assert few.grid == 32 * few.cluster
    assert few.shared_bytes > 0
    assert plan("token_stats", N=32, V=151936, truncated=1, clusters=0).cluster == 1


def test_masks_and_unmask() -> None:
    assert plan("annealed_mask", L=2048).bytes == 2048 * 2048 // 8
    assert plan("annealed_mask", L=33).bytes == 33 * 2 * 4
    assert plan("unmask", B=64, L=2048).grid == 64


def test_plans_of_mask_conversions() -> None:
    """Bools are a byte, words 4 bytes of 32 keys; 96 keys are whole words, 70 are not."""
    sizes = {"M": 2, "Lq": 50, "Lk": 96}
    for op in ("pack_mask", "unpack_mask"):
        assert plan(op, **sizes).bytes == 2 * 50 * (96 + 3 * 4)
        assert plan(op, **sizes).kernel == f"{op}_flat_kernel"
        assert plan(op, Lq=50, Lk=70).kernel == f"{op}_rows_kernel"
    assert plan("id_mask", **sizes).bytes == 2 * (50 * 3 * 4 + (50 + 96) * 8)
    assert plan("fragment_mask", **sizes).bytes == 2 * (50 * 3 * 4 + 128 * 8)
    assert plan("fragment_mask", **sizes, transpose=1).bytes == 2 * (50 * 3 * 4 + 2 * 128 * 8)
    assert plan("mask_tile_classes", **sizes, tile_rows=64, tile_cols=32).bytes == 2 * (50 * 3 * 4 + 3)


def test_losses_without_the_linear_gradient() -> None:
    """Scored rows are read; the gradient of every row is written; targets, masks, nll and lse besides."""
    sizes = {"B": 2, "L": 8, "V": 100, "dtype": torch.float32}
    tokens = 2 * 8 * (8 + 1 + 4 + 4)
    assert plan("shifted_cross_entropy", **sizes).bytes == 16 * 100 * 4 + tokens
    assert plan("shifted_cross_entropy", **sizes, N=5, backward=1).bytes == (5 + 16) * 100 * 4 + tokens
    nll = plan("linear_shifted_nll", N=10, H=8, V=100, copy_bandwidth=1e12, gemm_rate=1e12)
    assert (nll.kernel, nll.grid, nll.flops) == ("chunk_nll_kernel", 10, 2 * 10 * 8 * 100)


def test_attention() -> None:
    """B4 H32 L2048 D128: 128 queries a block, 64 keys; Q, K, V and O once, 4 bytes of logsumexp a query."""
    sizes = {"B": 4, "H": 32, "L": 2048, "D": 128}
    forward, backward = plan("attention", **sizes), plan("attention_backward", **sizes)
    assert (forward.kernel, forward.grid) == ("attention_forward_kernel<__nv_bfloat16, 128>", 4 * 32 * 16)
    assert backward.kernel == "attention_key_gradient_kernel<__nv_bfloat16, 128, true, true>"
    assert backward.grid == 4 * 32 * 32
    assert forward.shared_bytes == (128 + 3 * 64) * 128 * 2
    assert backward.shared_bytes == (2 * 64 + 2 * 64) * 128 * 2 + 64 * 64 * 2 + 2 * 64 * 8  # K, V, ring; dS; statistics
    assert forward.flops == 4 * 4 * 32 * 2048**2 * 128
    assert backward.flops == 2.5 * forward.flops
    assert forward.bytes == 4 * 32 * 2048 * (4 * 128 * 2 + 4)
    assert backward.bytes == 4 * 32 * 2048 * (8 * 128 * 2 + 4)
    causal, bits = plan("attention", **sizes, causal=1), plan("attention", **sizes, masks=1)
    assert causal.flops == 4 * 4 * 32 * (2048 * 2049 // 2) * 128
    assert bits.flops == forward.flops
    assert bits.bytes - forward.bytes == 2048 * 64 * 4 + 32 * 32
    grouped = plan("attention", B=4, H=32, Hkv=8, Lq=100, Lk=300, D=64)
    assert grouped.bytes == 4 * (2 * 64 * (2 * 32 * 100 + 2 * 8 * 300) + 4 * 32 * 100)


def test_attention_on_sm_90a() -> None:
    """A block a multiprocessor unless tiles differ in work; the same traffic; the widths of the dispatch."""
    sizes = {"B": 4, "H": 32, "L": 2048, "hopper": 1, "n_sm": 132}
    wide, causal = plan("attention", **sizes, D=128, masks=1), plan("attention", **sizes, D=128, causal=1)
    assert (wide.kernel, wide.grid, wide.block) == ("attention_hopper_forward_kernel<__nv_bfloat16, 128>", 132, 384)
    assert causal.grid == 4 * 32 * 16
    assert plan("attention", **sizes, D=64).block == 512
    assert plan("attention", **(sizes | {"B": 1, "H": 2, "L": 200}), D=64).grid == 4
    assert wide.bytes == plan("attention", **(sizes | {"hopper": 0}), D=128, masks=1).bytes
    backward = plan("attention_backward", **sizes, D=128, masks=1)
    assert backward.kernel == "attention_hopper_backward_kernel<__nv_bfloat16, 128, false>"
    assert (backward.grid, backward.block) == (132, 384)
    assert plan("attention_backward", **(sizes | {"B": 1, "H": 2, "L": 200}), D=64).grid == 4
    assert backward.flops == 2.5 * wide.flops
    assert all(plan("attention_backward", **sizes, D=D).shared_bytes <= 227 << 10 for D in attention_hopper.WIDTHS)
    for op, width in product(("attention", "attention_backward"), attention.KERNEL_WIDTHS):
        taken = plan(op, **sizes, D=width).kernel != "reference"
        assert taken == (width in attention_hopper.WIDTHS), "the plan and the dispatch in Python must agree"


@pytest.mark.parametrize("op", ["attention", "attention_backward"])
def test_attention_kernels_fit_every_architecture(op: str) -> None:
    """99 KB of shared memory a block on sm_86, sm_89 and sm_120; other sizes and dtypes have no kernel."""
    for D in (16, 32, 48, 64, 80, 96, 128, 160, 256, 512):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            got = plan(op, B=1, H=1, L=100, D=D, dtype=dtype)
            assert got.shared_bytes <= 99 << 10
            taken = dtype in attention.KERNEL_DTYPES and D in attention.KERNEL_WIDTHS
            assert (got.kernel != "reference") == taken, "the plan and the dispatch in Python must agree"


def test_floor_needs_the_rates_that_bound_the_op() -> None:
    sizes = {"N": 10, "H": 8, "V": 16}
    assert plan("linear_shifted_cross_entropy", **sizes).floor_s is None
    assert plan("linear_shifted_cross_entropy", **sizes, copy_bandwidth=1e12).floor_s is None
    slow_copy = plan("linear_shifted_cross_entropy", **sizes, copy_bandwidth=1.0, gemm_rate=1e12)
    assert slow_copy.floor_s == slow_copy.bytes
    assert plan("unmask", B=2, L=3, copy_bandwidth=2.0).floor_s == plan("unmask", B=2, L=3).bytes / 2


@pytest.mark.parametrize(
    ("op", "sizes", "message"),
    [
        ("softmax", {"N": 3}, "op must be one of annealed_mask, .*, got 'softmax'"),
        ("mask_tokens", {"B": 3}, "kernel_plan of mask_tokens needs L"),
        ("mask_tokens", {"B": 3, "L": 4, "V": 5}, "kernel_plan of mask_tokens takes no V"),
        ("attention", {"B": 1, "H": 3, "Hkv": 2, "L": 4, "D": 64}, "H must be a multiple of Hkv"),
        ("attention", {"B": 1, "H": 2, "Lq": 4, "D": 64}, "kernel_plan of attention needs Lk"),
        ("attention", {"B": 1, "H": 2, "L": 4, "D": 64, "causal": 1, "masks": 1}, "causal and masks exclude"),
        ("unmask", {"B": -1, "L": 4}, r"B must be in \[0, 2\^40\], got -1"),
        ("unmask", {"B": 1, "L": 2**41}, r"L must be in \[0, 2\^40\], got 2199023255552"),
        ("token_stats", {"N": 1, "V": 9, "dtype": torch.int8}, "element_size must be 2, 4 or 8, got 1"),
    ],
)
def test_bad_questions(op: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(op, **sizes)


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_plan.__globals__, "host_module", lambda: None)
    with pytest.raises(RuntimeError, match="_C"):
        kernel_plan("unmask", B=1, L=1)


def test_every_planned_op_is_a_schema() -> None:
    module = _library.host_module()
    assert module is not None
    names = torch._C._dispatch_get_all_op_names()
    assert {f"diffullama::{op}" for op in module.kernel_plan_ops()} <= set(names)


# --- resources -------------------------------------------------------------------------------------------------------


def built(kernel: str, arch: str, registers: int) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "arch": arch,
        "registers": registers,
        "spill_stores": 0,
        "spill_loads": 4 if registers > 200 else 0,
        "static_shared": 96,
    }


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [
        built("mask_tokens_kernel", arch, registers) for arch, registers in (("80", 50), ("86", 51), ("90a", 54))
    ] + [built(f"chunk_gradient_kernel<{t}, 4>", "90", r) for t, r in (("float", 60), ("__nv_bfloat16", 255))]
    path = tmp_path / "kernel_resources.json"
    path.write_text(json.dumps({"cuda": "13.0", "archs": "80 86 90", "kernels": kernels}))
    monkeypatch.setitem(kernel_plan.__globals__, "_RESOURCES", path)


@pytest.mark.usefixtures("report")
@pytest.mark.skipif(torch.cuda.is_available(), reason="variants of this machine's GPU")
def test_resources_of_the_architecture_and_dtype() -> None:
    (resources,) = plan("mask_tokens", B=1, L=1).resources
    assert dataclasses.astuple(resources) == ("mask_tokens_kernel", 90, 54, 0, 96)
    sizes = {"N": 10, "H": 8, "V": 16}
    (resources,) = plan("linear_shifted_cross_entropy", **sizes).resources
    assert (resources.registers, resources.spill_bytes) == (255, 4)
    (resources,) = plan("linear_shifted_cross_entropy", **sizes, dtype=torch.float32).resources
    assert resources.registers == 60
    assert plan("unmask", B=1, L=1).resources == ()


@pytest.mark.usefixtures("report")
@pytest.mark.parametrize(("arch", "registers"), [(80, 50), (89, 51), (90, 54), (75, None), (100, None)])
def test_a_device_runs_code_of_its_own_major(arch: int, registers: int | None) -> None:
    read, choose = (kernel_plan.__globals__[name] for name in ("_read_resources", "_variants"))
    found = choose(read(kernel_plan.__globals__["_RESOURCES"]), "mask_tokens_kernel", arch, torch.bfloat16)
    assert [r.registers for r in found] == ([] if registers is None else [registers])


def test_no_report_no_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_plan.__globals__, "_RESOURCES", tmp_path / "none.json")
    assert plan("unmask", B=1, L=1).resources == ()
