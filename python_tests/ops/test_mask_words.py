# SPDX-License-Identifier: Apache-2.0
"""pack_mask, unpack_mask, id_mask and annealed_mask: attention masks as words, bit for bit."""

from types import ModuleType

import numpy as np
import pytest
import torch
from comparison import assert_all_equal, compiled_frames, strided
from hypothesis import given
from hypothesis import strategies as st
from oracles import annealed_allowed
from torch import Tensor

import diffullama_ext
from diffullama_ext import AttentionMask

pytestmark = pytest.mark.op("annealed_mask")

DENSE_SHAPES = [(1, 1, 1), (2, 3, 31), (1, 5, 32), (3, 7, 33), (2, 64, 200), (1, 0, 5), (1, 4, 0), (0, 4, 4)]
ID_SHAPES = [(1, 1, 1), (2, 33, 70), (3, 5, 32), (1, 0, 3), (2, 3, 0)]
RATIOS = [1e-4, 0.01, 0.5, 0.99]


def _backend(impl: str) -> ModuleType:
    return diffullama_ext.ops.attention_mask if impl == "ext" else diffullama_ext.reference.attention_mask


def _packed(dense: np.ndarray) -> np.ndarray:
    """numpy's own bit packing, to whole little-endian int32 words."""
    n_masks, q_length, k_length = dense.shape
    padded = np.pad(dense, ((0, 0), (0, 0), (0, -k_length % 32)))
    octets = np.packbits(padded, axis=-1, bitorder="little")
    return octets.reshape(n_masks, q_length, -1, 4).view("<i4")[..., 0] if octets.size else octets.view(np.int32)


def _annealed(impl: str, device: str, length: int, ratio: float, seed: int = 1, step: int = 0) -> Tensor:
    scalars = (torch.tensor([ratio]), torch.tensor([seed]), torch.tensor([step]))
    return _backend(impl).annealed_mask(length, *(x.to(device) for x in scalars))


def _above_diagonal(words: Tensor, length: int) -> Tensor:
    """bool [length, length] of a mask of 1, False on and below the diagonal."""
    return AttentionMask("bits", length, length, words).to_dense()[0].triu(1)


@pytest.mark.parametrize("shape", DENSE_SHAPES, ids=str)
def test_pack_and_unpack_match_oracle(impl: str, device: str, shape: tuple[int, int, int]) -> None:
    dense = torch.rand(shape) < 0.5
    words = _backend(impl).pack_mask(dense.to(device))
    assert words.dtype == torch.int32
    assert np.array_equal(words.cpu().numpy(), _packed(dense.numpy()).reshape(*shape[:2], (shape[2] + 31) // 32))
    assert torch.equal(_backend(impl).unpack_mask(words, shape[2]).cpu(), dense)


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 130)), seed=st.integers(0, 2**32))
def test_pack_then_unpack_is_identity(impl: str, device: str, shape: tuple[int, int, int], seed: int) -> None:
    dense = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3).to(device)
    assert torch.equal(_backend(impl).unpack_mask(_backend(impl).pack_mask(dense), shape[2]), dense)


def test_unpack_ignores_bits_past_the_last_key(impl: str, device: str) -> None:
    words = torch.full((1, 2, 2), -1, dtype=torch.int32, device=device)
    assert torch.equal(_backend(impl).unpack_mask(words, 37), torch.ones(1, 2, 37, dtype=torch.bool, device=device))


@pytest.mark.parametrize("exact", [True, False], ids=["equal", "at-most"])
@pytest.mark.parametrize(
    ("n_masks", "q_length", "k_length"), [(1, 1, 1), (2, 33, 70), (3, 5, 32), (1, 0, 3), (2, 3, 0)]
)
def test_id_mask_matches_oracle(
    impl: str, device: str, n_masks: int, q_length: int, k_length: int, exact: bool
) -> None:
    q, k = torch.randint(-2, 3, (n_masks, q_length)), torch.randint(-2, 3, (n_masks, k_length))
    q[:, : q_length // 3], k[:, : k_length // 3] = 2**62, 2**62 + 1  # apart only in their low bits
    words = _backend(impl).id_mask(q.to(device), k.to(device), exact)
    a, b = q.numpy()[:, :, None], k.numpy()[:, None, :]
    expected = _packed(b == a if exact else b <= a).reshape(n_masks, q_length, (k_length + 31) // 32)
    assert np.array_equal(words.cpu().numpy(), expected)


@pytest.mark.parametrize("seed", [0, 12345, -1, 2**62 + 3])
@pytest.mark.parametrize(("length", "step"), [(1, 0), (31, 1), (33, 2**32 + 5), (100, -1)])
def test_annealed_mask_matches_oracle(impl: str, device: str, length: int, step: int, seed: int) -> None:
    for ratio in (*RATIOS, 2.0**-32, 1.0 / 3.0):
        words = _annealed(impl, device, length, ratio, seed, step)
        expected = _packed(annealed_allowed(length, ratio, seed, step)[None])
        assert np.array_equal(words.cpu().numpy(), expected)


@pytest.mark.ext
@pytest.mark.parametrize("length", [1, 64, 777])
def test_matches_reference(device: str, length: int) -> None:
    dense = torch.rand(2, length, length + 3, device=device) < 0.5
    ids = torch.randint(0, 9, (2, length), device=device)
    ours, expected = _backend("ext"), _backend("reference")
    words = expected.pack_mask(dense)
    assert_all_equal([ours.pack_mask(dense)], [words])
    assert_all_equal([ours.unpack_mask(words, length + 3)], [dense])
    for exact in (True, False):
        assert_all_equal([ours.id_mask(ids, ids, exact)], [expected.id_mask(ids, ids, exact)])
    for ratio in (0.0, *RATIOS, 1.0):
        arguments = (device, length, ratio, 77, 5)
        assert_all_equal([_annealed("ext", *arguments)], [_annealed("reference", *arguments)])


def test_noncontiguous(impl: str, device: str) -> None:
    backend = _backend(impl)
    dense = torch.rand(2, 9, 45, device=device) < 0.5
    q, k = torch.randint(0, 5, (2, 9), device=device), torch.randint(0, 5, (2, 45), device=device)
    words = backend.pack_mask(dense)
    assert_all_equal([backend.pack_mask(strided(dense))], [words])
    assert_all_equal([backend.unpack_mask(strided(words), 45)], [dense])
    assert_all_equal([backend.id_mask(strided(q), strided(k), True)], [backend.id_mask(q, k, True)])
    rows = q[:1].expand(2, 9)
    assert_all_equal([backend.id_mask(rows, k, False)], [backend.id_mask(rows.contiguous(), k, False)])


@pytest.mark.parametrize("length", [0, 1, 32, 45])
def test_extreme_values(impl: str, device: str, length: int) -> None:
    """Ratio 0 (and below, and NaN) is causal and 1 (and above) is full, exactly; bits past the last key are 0."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for ratio, allowed in (
        (0.0, causal),
        (-1.0, causal),
        (float("nan"), causal),
        (1.0, torch.ones_like(causal)),
        (2.0, torch.ones_like(causal)),
    ):
        words = _annealed(impl, device, length, ratio)
        assert words.shape == (1, length, (length + 31) // 32)
        assert np.array_equal(words.cpu().numpy(), _packed(allowed[None].numpy()).reshape(words.shape))


def test_mask_of_a_prefix_is_the_prefix_of_the_mask(impl: str, device: str) -> None:
    """The draw is keyed by (seed, step, q, k) alone."""
    long, short = (_above_diagonal(_annealed(impl, device, n, 0.5), n) for n in (101, 40))
    assert torch.equal(long[:40, :40], short)


@pytest.mark.parametrize("ratio", RATIOS)
def test_measured_rates(impl: str, device: str, ratio: float) -> None:
    length = 1000
    opened = int(_above_diagonal(_annealed(impl, device, length, ratio), length).sum())
    n = length * (length - 1) // 2
    assert abs(opened - n * ratio) <= 4 * (n * ratio * (1 - ratio)) ** 0.5


def test_no_visible_correlation(impl: str, device: str) -> None:
    """Rows, columns, steps and seeds: every pairwise correlation of the drawn half is noise-sized."""
    length = 512
    half = slice(0, length // 2), slice(length // 2, length)  # all above the diagonal: drawn, not causal
    draws = [
        _above_diagonal(_annealed(impl, device, length, 0.5, seed, step), length)[half].double() * 2 - 1
        for seed, step in ((1, 0), (1, 1), (1, 2), (2, 0))
    ]
    rows = torch.cat(draws)  # [4 * 256 rows, 256 columns]: a row of one draw against every row of all draws
    columns = torch.cat([draw.T for draw in draws])
    for lines in (rows, columns):
        z = (lines @ lines.T / lines.shape[1] ** 0.5).fill_diagonal_(0.0)
        assert z.abs().max() < 5.8  # the largest of half a million standard normals is about 5
    flat = torch.stack([draw.flatten() for draw in draws])
    assert (flat @ flat.T / flat.shape[1] ** 0.5).fill_diagonal_(0.0).abs().max() < 4


OPCHECK_CASES = {
    "pack_mask": lambda d: (torch.rand(2, 3, 37, device=d) < 0.5,),
    "unpack_mask": lambda d: (torch.full((2, 3, 2), 5, dtype=torch.int32, device=d), 37),
    "id_mask": lambda d: (torch.randint(0, 3, (2, 5), device=d), torch.randint(0, 3, (2, 9), device=d), True),
    "annealed_mask": lambda d: (
        37,
        torch.tensor([0.5], device=d),
        torch.tensor([1], device=d),
        torch.tensor([2], device=d),
    ),
}


@pytest.mark.ext
@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(device: str, op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.diffullama, op).default, OPCHECK_CASES[op](device))


@pytest.mark.ext
def test_compile_fullgraph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFULLAMA_IMPL", "ext")

    def step(ratio: Tensor, seed: Tensor, step: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = AttentionMask.annealed(45, ratio, seed=seed, step=step) & AttentionMask.documents(ids)
        return mask.words, (mask | AttentionMask.from_dense(mask.to_dense())).to_dense()

    calls = [
        (
            torch.tensor([0.1 * n], device=device),
            torch.tensor([n], device=device),
            torch.tensor([7 * n], device=device),
            torch.randint(0, 3, (45,), device=device),
        )
        for n in range(5)
    ]
    assert compiled_frames(step, calls, assert_all_equal) == 1


def test_deterministic(impl: str, device: str) -> None:
    assert_all_equal([_annealed(impl, device, 300, 0.3)], [_annealed(impl, device, 300, 0.3)])
