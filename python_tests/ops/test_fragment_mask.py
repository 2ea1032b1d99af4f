# SPDX-License-Identifier: Apache-2.0
"""fragment_mask and mask_tile_classes: the copies of a mask that attention kernels read."""

from types import ModuleType

import numpy as np
import pytest
import torch
from comparison import assert_all_equal, compiled_frames, strided
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import diffullama_ext
from diffullama_ext import AttentionMask

pytestmark = pytest.mark.op("fragment_mask")

SHAPES = [(1, 1, 1), (1, 64, 128), (2, 63, 127), (1, 65, 129), (1, 130, 31), (1, 70, 300), (3, 200, 96), (1, 260, 513)]
EMPTY = [(0, 4, 4), (1, 0, 5), (1, 4, 0)]
TILES = [(64, 128), (128, 128), (1, 1), (7, 33), (16, 200), (500, 32), (3, 5000)]


def _backend(impl: str) -> ModuleType:
    return diffullama_ext.ops.attention_mask if impl == "ext" else diffullama_ext.reference.attention_mask


def _mask(shape: tuple[int, int, int], device: str, allowed: float = 0.5) -> tuple[Tensor, Tensor]:
    dense = torch.rand(shape) < allowed
    return dense, diffullama_ext.reference.attention_mask.pack_mask(dense).to(device)


def _unpacked(fragments: Tensor, rows: int, columns: int) -> Tensor:
    """bool [M, rows, columns] by the definition, entry by entry; entries outside must be 0."""
    n_masks, row_tiles, column_tiles, threads, words = fragments.shape
    assert (row_tiles, column_tiles, threads, words) == ((rows + 63) // 64, (columns + 127) // 128, 128, 2)
    values = fragments.cpu().numpy().view(np.uint32)
    dense = np.zeros((n_masks, 64 * row_tiles, 128 * column_tiles), dtype=bool)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(64):
            v, rest = divmod(i, 4)
            r, c = divmod(rest, 2)
            row, column = 16 * warp + lane // 4 + 8 * r, 8 * v + 2 * (lane % 4) + c
            dense[:, row::64, column::128] = values[..., thread, i // 32] >> (i % 32) & 1
    assert not dense[:, rows:].any()
    assert not dense[:, :, columns:].any()
    return torch.from_numpy(dense[:, :rows, :columns])


def _classes(dense: Tensor, rows: int, cols: int) -> list[list[list[int]]]:
    """Tile by tile, from the slice of real entries."""
    n_masks, q_length, k_length = dense.shape

    def of_tile(m: int, q: int, k: int) -> int:
        tile = dense[m, q : q + rows, k : k + cols]
        return 0 if not tile.any() else 1 if tile.all() else 2

    return [
        [[of_tile(m, q, k) for k in range(0, k_length, cols)] for q in range(0, q_length, rows)] for m in range(n_masks)
    ]


@pytest.mark.parametrize("transpose", [False, True], ids=["mask", "transpose"])
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_fragments_are_the_mask(impl: str, device: str, shape: tuple[int, int, int], transpose: bool) -> None:
    dense, words = _mask(shape, device)
    fragments = _backend(impl).fragment_mask(words, shape[2], transpose)
    assert fragments.dtype == torch.int32
    expected = dense.mT if transpose else dense
    assert torch.equal(_unpacked(fragments, *expected.shape[1:]), expected)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 300), st.integers(1, 300)),
    transpose=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_fragments_round_trip(impl: str, device: str, shape: tuple[int, int, int], transpose: bool, seed: int) -> None:
    torch.manual_seed(seed)
    dense, words = _mask(shape, device)
    unpacked = _unpacked(
        _backend(impl).fragment_mask(words, shape[2], transpose), *(shape[:0:-1] if transpose else shape[1:])
    )
    assert torch.equal(unpacked.mT if transpose else unpacked, dense)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("allowed", [0.0, 0.02, 0.98, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 130, 161), (1, 300, 64)], ids=str)
def test_tile_classes(
    impl: str, device: str, shape: tuple[int, int, int], allowed: float, tile: tuple[int, int]
) -> None:
    dense, words = _mask(shape, device, allowed)
    classes = _backend(impl).mask_tile_classes(words, shape[2], *tile)
    assert classes.dtype == torch.uint8
    assert classes.tolist() == _classes(dense, *tile)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_no_tiles(impl: str, device: str, shape: tuple[int, int, int]) -> None:
    _, words = _mask(shape, device)
    classes = _backend(impl).mask_tile_classes(words, shape[2], 64, 128)
    assert classes.shape == (shape[0], min(shape[1], 1), min(shape[2], 1))


def test_one_entry_decides_a_tile(impl: str, device: str) -> None:
    """Any single entry that differs, the ends of tiles among them, turns its tile and no other to bits."""
    for value in (False, True):
        for q, k in ((0, 0), (63, 127), (64, 128), (129, 160), (64, 31), (63, 32)):
            dense = torch.full((1, 130, 161), not value)
            dense[0, q, k] = value
            words = diffullama_ext.reference.attention_mask.pack_mask(dense).to(device)
            expected = torch.full((1, 3, 2), int(not value))
            expected[0, q // 64, k // 128] = 2
            assert torch.equal(_backend(impl).mask_tile_classes(words, 161, 64, 128).cpu().long(), expected)


def test_bits_past_the_last_key_do_not_count(impl: str, device: str) -> None:
    """Words may hold anything there."""
    words = torch.full((1, 70, 2), -1, dtype=torch.int32, device=device)
    backend = _backend(impl)
    ones = torch.ones(1, 70, 37, dtype=torch.bool)
    assert torch.equal(_unpacked(backend.fragment_mask(words, 37, False), 70, 37), ones)
    assert torch.equal(_unpacked(backend.fragment_mask(words, 37, True), 37, 70), ones.mT)
    assert backend.mask_tile_classes(words, 37, 64, 128).flatten().tolist() == [1, 1]
    words[..., 1] = ~0b11111
    assert backend.mask_tile_classes(words, 37, 64, 32).flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.ext
@pytest.mark.parametrize("transpose", [False, True], ids=["mask", "transpose"])
@pytest.mark.parametrize("length", [1, 128, 333])
def test_matches_reference(device: str, length: int, transpose: bool) -> None:
    _, words = _mask((2, length, length + 40), device)
    ours, expected = _backend("ext"), _backend("reference")
    arguments = (words, length + 40, transpose)
    assert_all_equal([ours.fragment_mask(*arguments)], [expected.fragment_mask(*arguments)])
    arguments = (words, length + 40, 64, 96)
    assert_all_equal([ours.mask_tile_classes(*arguments)], [expected.mask_tile_classes(*arguments)])


def test_noncontiguous(impl: str, device: str) -> None:
    _, words = _mask((2, 70, 140), device)
    backend = _backend(impl)
    for transpose in (False, True):
        arguments = (140, transpose)
        assert_all_equal(
            [backend.fragment_mask(strided(words), *arguments)], [backend.fragment_mask(words, *arguments)]
        )
    classes = [backend.mask_tile_classes(w, 140, 64, 64) for w in (strided(words), words)]
    assert_all_equal(classes[:1], classes[1:])


@pytest.mark.parametrize("kind", ["causal", "full", "annealed", "documents"])
def test_of_attention_masks(impl: str, device: str, kind: str) -> None:
    mask = {
        "causal": lambda: AttentionMask.causal(200, device=device),
        "full": lambda: AttentionMask.full(200, 90, device=device),
        "annealed": lambda: AttentionMask.annealed(200, 0.3, seed=1, device=device),
        "documents": lambda: AttentionMask.documents(torch.arange(200, device=device)[None] // 70),
    }[kind]()
    dense = mask.to_dense().cpu()
    assert torch.equal(_unpacked(mask.fragments(), *dense.shape[1:]), dense)
    assert torch.equal(_unpacked(mask.fragments(transpose=True), *dense.shape[:0:-1]), dense.mT)
    assert mask.tile_classes(64, 128).tolist() == _classes(dense, 64, 128)
    assert mask.fragments() is mask.fragments(False)
    assert mask.fragments(True) is not mask.fragments()
    assert mask.tile_classes(64, 128) is mask.tile_classes(64, 128)
    assert mask.tile_classes(128, 64).shape == (1, 2, (dense.shape[2] + 63) // 64)


@pytest.mark.parametrize("tile", [(0, 64), (64, -1), (2**31, 64)], ids=str)
def test_rejects_bad_tiles(impl: str, device: str, tile: tuple[int, int]) -> None:
    mask = AttentionMask.causal(8, device=device)
    with pytest.raises(ValueError, match=r"^(rows|cols) must be in \[1, "):
        mask.tile_classes(*tile)


@pytest.mark.ext
def test_ops_reject_bad_arguments(device: str) -> None:
    words = torch.zeros(1, 5, 2, dtype=torch.int32, device=device)
    for call, message in (
        (lambda: _backend("ext").fragment_mask(words, 65, False), "words must have shape"),
        (lambda: _backend("ext").mask_tile_classes(words, 32, 64, 64), "words must have shape"),
        (lambda: _backend("ext").mask_tile_classes(words, 64, 0, 64), "tile_rows and tile_cols must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


OPCHECK_CASES = {
    "fragment_mask": [(70, False), (70, True)],
    "mask_tile_classes": [(70, 64, 128), (70, 3, 5)],
}


@pytest.mark.ext
@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(device: str, op: str) -> None:
    _, words = _mask((2, 66, 70), device)
    for rest in OPCHECK_CASES[op]:
        torch.library.opcheck(getattr(torch.ops.diffullama, op).default, (words, *rest))


@pytest.mark.ext
def test_compile_fullgraph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFULLAMA_IMPL", "ext")

    def step(ratio: Tensor, seed: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        mask = AttentionMask.annealed(70, ratio, seed=seed, step=step)
        return mask.fragments(), mask.fragments(True), mask.tile_classes(64, 64), mask.fragments()

    calls = [tuple(torch.tensor([value], device=device) for value in (0.1 * n, n, 7 * n)) for n in range(4)]
    assert compiled_frames(step, calls, assert_all_equal) == 1


def test_deterministic(impl: str, device: str) -> None:
    _, words = _mask((1, 300, 200), device)
    backend = _backend(impl)
    for transpose in (False, True):
        assert_all_equal(*([backend.fragment_mask(words, 200, transpose)] for _ in range(2)))
    assert_all_equal(*([backend.mask_tile_classes(words, 200, 64, 64)] for _ in range(2)))
