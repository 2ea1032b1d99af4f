# SPDX-License-Identifier: Apache-2.0
"""Each operation of the simulator against what CUDA defines, computed with NumPy."""

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

SUCCESS, INVALID_CONFIGURATION, TOO_LARGE = 0, 9, 720


@pytest.fixture
def call(checks: ctypes.CDLL) -> Callable[..., int]:
    """Calls a check by name; arrays go by pointer, ints as int32."""

    def run(name: str, *arguments: np.ndarray | int | bool) -> int:
        converted = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments]
        return getattr(checks, f"check_{name}")(*converted)

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_shuffles(call: Callable[..., int], rng: np.random.Generator) -> None:
    value = rng.integers(-(2**20), 2**20, 32)
    lane = np.arange(32)
    out = np.full((8, 32), -7)
    assert call("shuffles", value, out) == SUCCESS
    down = np.where(lane % 16 + 5 < 16, lane + 5, lane)
    sources = [np.full(32, 5), lane * 7 % 32, lane // 8 * 8 + 3, np.where(lane < 3, lane, lane - 3), down, lane ^ 9]
    sources += [lane ^ 1, (lane + 2) % 32]
    expected = value[np.stack(sources)]
    expected[7, 1::2] = -1
    assert (out == expected).all()


def test_votes_matches_reductions(call: Callable[..., int], rng: np.random.Generator) -> None:
    value = rng.integers(-3, 4, 32).astype(np.int32)
    bits = value.astype(np.uint32)
    out = np.zeros((11, 32), np.int64)
    assert call("votes", value, out) == SUCCESS
    place = 1 << np.arange(32)
    same = value[:, None] == value
    rows = [place[value > 0].sum(), 1, 1, (same * place).sum(1), value.sum(), value.min(), bits.max()]
    rows += [np.bitwise_and.reduce(bits), np.bitwise_or.reduce(bits), np.bitwise_xor.reduce(bits)]
    rows += [(same * np.arange(32)).sum(1)]
    assert out.tolist() == [np.broadcast_to(row, 32).tolist() for row in rows]


@pytest.mark.parametrize("blocks", [1, 7])
def test_block_sum_and_scan(call: Callable[..., int], rng: np.random.Generator, blocks: int) -> None:
    value = rng.integers(-100, 100, (blocks, 256)).astype(np.int32)
    totals, before = np.zeros(blocks, np.int64), np.zeros_like(value)
    assert call("sum_scan", value, totals, before, blocks) == SUCCESS
    assert (totals == value.sum(1)).all()
    assert (before == value.cumsum(1) - value).all()


@pytest.mark.parametrize(("threads", "n"), [(1024, 5000), (33, 100), (1, 3)])
def test_dynamic_shared_and_block_votes(
    call: Callable[..., int], rng: np.random.Generator, threads: int, n: int
) -> None:
    value = rng.integers(-50, 50, (3, n)).astype(np.int32)
    value[1], value[2] = 1, 0
    out, votes = np.zeros_like(value), np.zeros((3, 3), np.int32)
    assert call("reverse", value, out, votes, 3, threads, n) == SUCCESS
    assert (out == value[:, ::-1]).all()
    positive = value[:, np.arange(threads) % n] > 0
    assert (votes == np.stack([positive.sum(1), positive.any(1), positive.all(1)], 1)).all()


@pytest.mark.parametrize("warps", [2, 5, 32])
def test_named_barriers_order_a_pipeline(call: Callable[..., int], rng: np.random.Generator, warps: int) -> None:
    value = rng.integers(0, 1000, (20, 32)).astype(np.int32)
    out = np.zeros((20, warps - 1, 32), np.int32)
    assert call("pipeline", value, out, 20, warps) == SUCCESS
    assert (out == value[:, None, np.arange(32) ^ 1] * np.arange(1, warps)[:, None]).all()


def test_atomics(call: Callable[..., int], rng: np.random.Generator) -> None:
    value = rng.integers(-(2**31), 2**31, 1000).astype(np.int32)
    out = np.array([0, 2**31 - 1, -(2**31), 0, -1, 0, -(2**31), 0, 0], np.int32)
    wide = np.zeros(1, np.uint64)
    assert call("atomics", value, out, wide, value.size) == SUCCESS
    total = value.sum(dtype=np.int64)
    bitwise = [f.reduce(value) for f in (np.bitwise_or, np.bitwise_and, np.bitwise_xor)]
    assert out.tolist() == [total.astype(np.int32), value.min(), value.max(), *bitwise, value.max(), 1, 1]
    assert wide.view(np.int64)[0] == total


def test_sums_of_floats(call: Callable[..., int], rng: np.random.Generator) -> None:
    """Of whole numbers, which add up in any order."""
    value = rng.integers(-1000, 1000, 500).astype(np.float32)
    one, four = np.full(1, 3, np.float32), np.full(4, -2, np.float32)
    assert call("reduce", value, one, four, value.size) == SUCCESS
    assert one[0] == 3 + value.sum()
    assert (four == -2 + value.sum() * np.arange(1, 5)).all()


def test_turns_order_sums_of_floats(call: Callable[..., int], rng: np.random.Generator) -> None:
    """Blocks that run together add as one after the other does: every rounding is that of a loop."""
    blocks, n = 50, 4
    value = (rng.standard_normal(blocks) * 10.0 ** rng.integers(-3, 4, blocks)).astype(np.float32)
    sums, counters = np.zeros((n, 32), np.float32), np.zeros(1 + n, np.int32)
    assert call("turns", value, sums, counters, blocks, n) == SUCCESS
    for i in range(n):
        expected = np.float32(0)
        for k in range(blocks):
            if (k + i) % 3 != 1:
                expected += value[k]
        assert (sums[i] == expected).all()


@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_cluster_shared_memory(call: Callable[..., int], rng: np.random.Generator, cluster: int) -> None:
    value = rng.integers(0, 1000, 16).astype(np.int32)
    out = np.zeros_like(value)
    assert call("cluster", value, out, 16, cluster) == SUCCESS
    groups = value.reshape(-1, cluster)
    following = np.pad(groups, ((0, 0), (0, 1)))[:, 1:]
    assert (out == (groups.sum(1, keepdims=True) + 9 * following).reshape(-1)).all()


def test_grid_barrier(call: Callable[..., int], rng: np.random.Generator) -> None:
    a = rng.integers(0, 100, (6, 128)).astype(np.int32)
    b, expected = np.zeros_like(a), a
    for _ in range(5):
        expected = expected + np.roll(expected, -1, axis=0)
    assert call("grid", a, b, 6, 128, 5) == SUCCESS
    assert (b == expected).all()


def test_blocks_that_wait_for_earlier_tickets(call: Callable[..., int], rng: np.random.Generator) -> None:
    value = rng.integers(0, 100, 50).astype(np.int32)
    ticket, published = np.zeros(1, np.uint32), np.full(50, -1)
    assert call("chain", value, ticket, published, 50) == SUCCESS
    assert (published == value.cumsum()).all()


def test_launches_that_cuda_refuses(call: Callable[..., int]) -> None:
    a, resident = np.zeros(1 << 16, np.int32), np.zeros(1, np.int64)
    assert call("reverse", a, a, a, 1, 1025, 10) == INVALID_CONFIGURATION
    assert call("reverse", a, a, a, 0, 32, 10) == INVALID_CONFIGURATION
    assert call("reverse", a, a, a, 1, 32, 60_000) == INVALID_CONFIGURATION, "240 KB of shared memory"
    assert call("cluster", a, a, 3, 2) == INVALID_CONFIGURATION
    assert call("resident", 256, 0, resident) == SUCCESS
    assert call("grid", a, a, int(resident[0]), 256, 1) == SUCCESS
    assert call("grid", a, a, int(resident[0]) + 1, 256, 1) == TOO_LARGE


# --- tensor cores


@pytest.mark.parametrize("transposed", [False, True], ids=["b[K,N]", "b[N,K]"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("m", "n", "k"), [(32, 16, 32), (64, 48, 160)])
def test_matrix_product(call: Callable[..., int], m: int, n: int, k: int, dtype: torch.dtype, transposed: bool) -> None:
    """Small integers: every sum is exact."""
    a, b = torch.randint(-8, 9, (m, k)).to(dtype), torch.randint(-8, 9, (k, n)).to(dtype)
    given = b.T.contiguous() if transposed else b
    c = np.full((m, n), np.nan, np.float32)
    bits = [x.view(torch.int16).numpy() for x in (a, given)]
    assert call("product", *bits, c, m, n, k, transposed, dtype == torch.bfloat16) == SUCCESS
    assert (c == (a.double() @ b.double()).numpy()).all()


def test_fragments(call: Callable[..., int]) -> None:
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((6, 4, 32), np.uint32)
    assert call("fragments", matrices, out) == SUCCESS
    expected = np.zeros_like(out)
    for row, (count, transpose) in enumerate(itertools.product((1, 2, 4), (False, True))):
        for m, lane in itertools.product(range(count), range(32)):
            matrix = matrices[m].T if transpose else matrices[m]
            low, high = matrix[lane // 4, lane % 4 * 2 :][:2].astype(np.uint32)
            expected[row, m, lane] = low | high << 16
    assert (out == expected).all()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("n", [1, 31, 64])
def test_copies_end_in_zeros(call: Callable[..., int], rng: np.random.Generator, n: int, size: int) -> None:
    source = np.zeros(n + 16, np.uint8)
    source = source[-source.ctypes.data % 16 :][:n]  # aligned
    source[:] = rng.integers(1, 256, n)
    out = np.full(n + size, 7, np.uint8)
    assert call("tail", source, out, n, size) == SUCCESS
    end = -(-n // size) * size
    assert out.tolist() == [*source.tolist(), *[0] * (end - n), *[7] * (n + size - end)]


# --- intrinsics


def _bits_oracle(a: int, b: int) -> list[int]:
    x, y = a % 2**32, b % 2**32
    pair, shift = y << 32 | x, x % 32
    selected = [(pair >> 8 * (y >> 4 * k & 7)) & 255 for k in range(4)]
    return [
        32 - x.bit_length(),
        64 - a.bit_length(),
        x.bit_count(),
        a.bit_count(),
        (x & -x).bit_length(),
        (a & -a).bit_length(),
        int(f"{x:032b}"[::-1], 2),
        int(f"{a:064b}"[::-1], 2),
        x * y >> 32,
        a * b >> 64,
        sum(byte << 8 * k for k, byte in enumerate(selected)),
        (pair << shift) >> 32 & 0xFFFFFFFF,
        pair >> shift & 0xFFFFFFFF,
    ]


def test_bit_intrinsics(call: Callable[..., int], rng: np.random.Generator) -> None:
    edges = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1], np.uint64)
    a = np.concatenate([edges, rng.integers(0, 2**64, 200, np.uint64), np.repeat(edges, 7)])
    b = np.concatenate([rng.integers(0, 2**64, 207, np.uint64), np.tile(edges, 7)])
    out = np.zeros((a.size, 13), np.uint64)
    assert call("bits", a, b, out, a.size) == SUCCESS
    assert out.tolist() == [_bits_oracle(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def _clamped(v: float, rounded: Callable[[float], float], low: int, high: int) -> int:
    return 0 if np.isnan(v) else high if v >= high else low if v <= low else int(rounded(v))


def test_conversions(call: Callable[..., int], rng: np.random.Generator) -> None:
    edges = [
        0.0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        1e-40,
        6e-8,
        5.96e-8,
        2.98e-8,
        65504,
        65519.9,
        65520,
        3e38,
        1e10,
        -1e10,
    ]
    special = [np.inf, -np.inf, np.nan, 2.0**31, -(2.0**31), 2.0**32, 1.8e19, 1.9e19, 3.3961775e38]
    value = np.concatenate([edges, special, rng.normal(size=300), rng.normal(size=100) * 2e5]).astype(np.float32)
    out = np.zeros((value.size, 6), np.int64)
    half, bfloat16 = np.zeros(value.size, np.uint16), np.zeros(value.size, np.uint16)
    assert call("conversions", value, out, half, bfloat16, value.size) == SUCCESS
    for row, v in zip(out.tolist(), value.tolist(), strict=True):
        assert row[0] == _clamped(v, np.rint, -(2**31), 2**31 - 1)
        assert row[1] == _clamped(v, np.trunc, -(2**31), 2**31 - 1)
        assert row[2] == _clamped(v, np.rint, 0, 2**32 - 1)
        assert row[3] % 2**64 == _clamped(v, np.rint, 0, 2**64 - 1)
    assert (out[:, 4] == value.view(np.uint32)).all()
    number = ~np.isnan(value)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.where(value < -126, 0, np.exp2(value.astype(np.float64)).astype(np.float32))
        np.testing.assert_allclose(out[:, 5].astype(np.uint32).view(np.float32)[number], expected[number], rtol=3e-7)
    tensor = torch.from_numpy(value)
    for got, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        wide = torch.from_numpy(got.view(np.int16)).view(dtype)
        torch.testing.assert_close(wide, tensor.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_widening(call: Callable[..., int]) -> None:
    got = np.zeros((2, 65536), np.float32)
    assert call("widening", got[0], got[1]) == SUCCESS
    patterns = torch.arange(65536).to(torch.int16)
    for row, dtype in zip(got, (torch.float16, torch.bfloat16), strict=True):
        expected = patterns.view(dtype).float()
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=0, atol=0, equal_nan=True)


def test_order_differs_between_launches(call: Callable[..., Any]) -> None:
    orders = np.full((8, 20), -1)
    for order in orders:
        assert call("order", np.zeros(1, np.uint32), order, 20) == SUCCESS
    assert (np.sort(orders) == np.arange(20)).all()
    assert len({tuple(order) for order in orders.tolist()}) == 8
