# SPDX-License-Identifier: Apache-2.0
"""mbarrier, TMA and wgmma of sm_90a in the simulator against what PTX defines; the attention kernels that use them,
whole and broken in one place."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from host_compiler import CSRC, build, run

SUCCESS, INVALID_VALUE = 0, 1
KERNEL, BASE = "attention/attention_hopper_forward_kernel.cu", "common/hopper.cuh"
SOFTMAX, MASK = "attention/attention_hopper_softmax.cuh", "attention/attention_hopper_mask.cuh"
PIPELINE = "attention/attention_hopper_pipeline.cuh"
BACKWARD, SHARED = "attention/attention_hopper_backward_kernel.cu", "attention/attention_hopper_backward.cuh"
FORWARD_SOURCES = (KERNEL, "testing/mutations/attention_hopper.cu")
BACKWARD_SOURCES = (BACKWARD, "testing/mutations/attention_hopper_backward.cu")


@pytest.fixture
def call(checks: ctypes.CDLL) -> Callable[..., int]:
    """Calls a check by name; arrays go by pointer, ints as int32."""

    def run_check(name: str, *arguments: np.ndarray | int | bool) -> int:
        converted = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments]
        return int(getattr(checks, f"check_{name}")(*converted))

    return run_check


def _swizzled(rows: np.ndarray) -> np.ndarray:
    """Rows of 64 elements as they lie: the 16-byte chunk c of row r at place c ^ (r % 8)."""
    chunks = rows.reshape(len(rows), 8, 8)
    place = np.arange(8)[None, :] ^ np.arange(len(rows))[:, None] % 8
    out = np.empty_like(chunks)
    np.put_along_axis(out, place[:, :, None].repeat(8, axis=2), chunks, axis=1)
    return out.reshape(rows.shape)


@pytest.mark.parametrize(
    ("size", "at", "rows"),
    [
        ((64, 64, 1, 1), (0, 0, 0, 0), 64),
        ((128, 40, 3, 2), (64, 8, 2, 1), 32),
        ((128, 40, 3, 2), (64, 30, 1, 1), 24),  # rows past the end are zeros, not the next matrix's
        ((64, 5, 2, 2), (0, 5, 0, 0), 16),
        ((128, 20, 2, 2), (-8, -3, 1, 0), 16),
        ((72, 20, 2, 1), (64, 2, 0, 0), 8),
        ((64, 20, 2, 1), (0, 2, 2, 0), 8),
    ],
)
def test_box(call: Callable[..., int], size: tuple[int, ...], at: tuple[int, ...], rows: int) -> None:
    tensor = np.random.default_rng(0).integers(1, 2**16, size[::-1], dtype=np.uint16)
    out = np.zeros((rows, 64), np.uint16)
    assert call("box", tensor, np.array(size, np.int32), np.array(at, np.int32), rows, out) == SUCCESS
    x, y, z, w = at
    expected = np.zeros((rows, 64), np.uint16)
    for r in range(rows):
        for c in range(64):
            if 0 <= x + c < size[0] and 0 <= y + r < size[1] and 0 <= z < size[2] and 0 <= w < size[3]:
                expected[r, c] = tensor[w, z, y + r, x + c]
    assert (out == _swizzled(expected)).all()


def test_box_the_driver_refuses(call: Callable[..., int]) -> None:
    tensor, out = np.zeros(4096, np.uint16), np.zeros((8, 64), np.uint16)
    at = np.zeros(4, np.int32)
    assert call("box", tensor, np.array([68, 8, 1, 1], np.int32), at, 8, out) == INVALID_VALUE  # rows of 136 bytes
    assert call("box", tensor[1:], np.array([64, 8, 1, 1], np.int32), at, 8, out) == INVALID_VALUE
    assert call("box", tensor, np.array([64, 8, 1, 1], np.int32), at, 257, out) == INVALID_VALUE


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("transposed", [False, True], ids=["K-major", "N-major"])
@pytest.mark.parametrize("left", [0, 1, 2], ids=["rows", "registers", "columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wgmma(call: Callable[..., int], columns: int, transposed: bool, left: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 128, generator=generator).to(dtype)
    b = torch.randn(128, columns, generator=generator).to(dtype)
    out = np.full((64, columns), np.nan, np.float32)
    bits = [x.contiguous().view(torch.int16).numpy() for x in (a, b if transposed else b.T)]
    assert call("wgmma", *bits, out, columns, transposed, left, dtype == torch.bfloat16) == SUCCESS
    torch.testing.assert_close(torch.from_numpy(out).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [8, 24, 512])
def test_bulk_copy(call: Callable[..., int], n: int) -> None:
    values, out = np.arange(1, n + 1, dtype=np.uint16), np.zeros(n, np.uint16)
    assert call("bulk", values, 2 * n, out) == SUCCESS
    assert (out == values).all()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_ring(call: Callable[..., int], n: int) -> None:
    tiles = np.random.default_rng(0).integers(0, 2**16, (n, 64, 64), dtype=np.uint16)
    out = np.zeros((64, 64), np.uint32)
    assert call("ring", tiles, out, n) == SUCCESS
    assert (out == sum(_swizzled(tile).astype(np.uint32) for tile in tiles)).all()


class Mutation(NamedTuple):
    """One edit, and a word of what it leads to; "" where that depends on the order of threads."""

    path: str
    old: str
    new: str
    outcome: str = "differs"


MUTATIONS = {
    "scores read before their products are done": Mutation(KERNEL, "wgmma_wait<1>(s);", ""),
    "outputs scaled while their product runs": Mutation(KERNEL, "wgmma_wait<0>(out, probabilities);\n        if", "if"),
    "no wgmma_fence": Mutation(KERNEL, "wgmma_fence(s, out, probabilities);", "", "without wgmma_fence"),
    "K given back before it is read": Mutation(
        KERNEL,
        "        wgmma_wait<1>(s);\n        release(pipeline.k_empty[k_at.stage()]);",
        "        release(pipeline.k_empty[k_at.stage()]);\n        wgmma_wait<1>(s);",
    ),
    "V used before it is there": Mutation(
        KERNEL, "mbarrier_wait(pipeline.v_full[v_at.stage()], v_at.parity());", "", ""
    ),
    "the next queries loaded while these are used": Mutation(
        KERNEL, "mbarrier_wait(pipeline.q_empty, q_parity ^ 1);", ""
    ),
    "queries skipped by the counter": Mutation(KERNEL, "? take(p.taken)", "? take(p.taken) + 1"),
    "consumers not told to stop": Mutation(KERNEL, "next_item({KeyTile::kStop, 0, 0});", "return;", ""),
    "one arrival short": Mutation(KERNEL, "kConsumerWarps = 4 * kTile.groups", "kConsumerWarps = 4", ""),
    "too few bytes expected": Mutation(PIPELINE, "static_cast<int>(sizeof to)", "static_cast<int>(sizeof to) / 2", ""),
    "panels too close": Mutation(KERNEL, "kHopperColumns * kPanel * 2;", "kHopperColumns * kPanel;"),
    "unaligned swizzle": Mutation(BASE, "% kSwizzleBytes);", "% 128);", "inside the swizzle"),
    "outputs rescaled where both rows have a new maximum": Mutation(KERNEL, "1.0f || factor", "1.0f && factor"),
    "sums not brought to the new maximum": Mutation(SOFTMAX, "fmaf(rows.sum[r], factor[r], sum)", "rows.sum[r] + sum"),
    "bits of the other rows": Mutation(MASK, "query(q0 + fragment_row", "query(fragment_row"),
}


BACKWARD_MUTATIONS = {
    "scores read before their products are done": Mutation(BACKWARD, "wgmma_wait<1>(s);", ""),
    "dP read before its products are done": Mutation(BACKWARD, "if (half == 0) wgmma_wait<1>(dp);", ""),
    "dQ added before it is there": Mutation(BACKWARD, "wgmma_wait<0>(dk, dv, dq);", "", ""),
    "no wgmma_fence": Mutation(BACKWARD, "wgmma_fence(dk, left_ds[half]);", "", "without wgmma_fence"),
    "dS of the others not waited for": Mutation(BACKWARD, "mbarrier_wait(pipeline.ds_full, buffer);", ""),
    "dS of half the warps waited for": Mutation(
        SHARED, "mbarrier_init(ds_full, kConsumerWarps)", "mbarrier_init(ds_full, 4)", ""
    ),
    "one buffer of dS": Mutation(SHARED, "buffer * kHalves * kKeyPanel", "0"),
    "dS not swizzled": Mutation(BACKWARD, "row * kPanel + row % 8 * 8", "row * kPanel"),
    "dQ of the other queries": Mutation(SHARED, "tiles.ds[0][D == 64 ? group : 0]", "tiles.ds[0][0]"),
    "dQ in the other columns": Mutation(BACKWARD, "D == 64 ? 0 : 8 * group", "0"),
    "the next keys loaded while these are used": Mutation(
        BACKWARD, "mbarrier_wait(pipeline.keys_empty, parity ^ 1);", "", ""
    ),
    "dO used before it is there": Mutation(
        BACKWARD, "mbarrier_wait(pipeline.dout_full[at.stage()], at.parity());", "", ""
    ),
    "an end that dO's barrier does not see": Mutation(
        BACKWARD, "mbarrier_arrive(pipeline.dout_full[at.stage()]);", "", ""
    ),
    "statistics not expected": Mutation(BACKWARD, "q0, head, b, kBytes);", "q0, head, b);", ""),
    "statistics of another head": Mutation(BACKWARD, "item.head * queries + q0", "item.head * p.Lq + q0"),
    "padding of the other keys": Mutation(MASK, "allows_key(mask, key + 8)", "allows_key(mask, key)"),
    "causal order of the other keys": Mutation(MASK, "bits_from(key + 8 - 32 * w)", "bits_from(key - 32 * w)"),
    "bits of the other queries": Mutation(MASK, "(2 * kFragmentThreads) + word % 2", "(2 * kFragmentThreads)"),
    "dK without the scale": Mutation(BACKWARD, "factor[2] = {p.scale, p.scale}", "factor[2] = {1.0f, 1.0f}"),
}


@pytest.mark.parametrize("sources", [FORWARD_SOURCES, BACKWARD_SOURCES], ids=["forward", "backward"])
@pytest.mark.parametrize("seed", [0, 1])
def test_attention_kernel_as_it_is(sources: tuple[str, ...], seed: int) -> None:
    assert run(build(sources), seed=seed) == (0, "agrees\n")


@pytest.mark.parametrize(
    ("sources", "case"), [(FORWARD_SOURCES, "5"), (BACKWARD_SOURCES, "4")], ids=["forward", "backward"]
)
def test_attention_kernel_sanitized(sources: tuple[str, ...], case: str) -> None:
    assert run(build(sources, "sanitized"), case) == (0, "agrees\n")


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_of_the_forward_is_noticed(name: str, tmp_path: Path) -> None:
    _notice(MUTATIONS[name], FORWARD_SOURCES, tmp_path)


@pytest.mark.parametrize("name", BACKWARD_MUTATIONS)
def test_mutation_of_the_backward_is_noticed(name: str, tmp_path: Path) -> None:
    _notice(BACKWARD_MUTATIONS[name], BACKWARD_SOURCES, tmp_path)


def _notice(mutation: Mutation, sources: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "csrc"
    for folder in ("common", "attention", "attention_mask", "testing"):
        shutil.copytree(CSRC / folder, root / folder)
    path = root / mutation.path
    text = path.read_text()
    assert mutation.old in text, "the kernel has changed: change the mutation"
    path.write_text(text.replace(mutation.old, mutation.new, 1))
    program = build(sources, root=root)
    results = (run(program, seed=seed) for seed in range(6))
    output = next((output for status, output in results if status != 0), "agrees in every order of threads")
    assert mutation.outcome in output
    assert "agrees" not in output
