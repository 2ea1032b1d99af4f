# SPDX-License-Identifier: Apache-2.0
"""The sizes and alignments at which the CUDA mask kernels change their way; on the CPU ordinary cases."""

import numpy as np
import pytest
import torch
from oracles import annealed_allowed
from torch import Tensor

from diffullama_ext import AttentionMask, reference
from diffullama_ext.ops import attention_mask as ext

pytestmark = [pytest.mark.op("fragment_mask"), pytest.mark.ext]

MASKS = reference.attention_mask
SHAPES_OF_FRAGMENTS = [
    (1, 64, 128),
    (2, 128, 256),
    (1, 129, 384),
    (1, 300, 257),
    (1, 70, 640),
    (1, 5, 17_000),  # more column tiles than a grid has rows
    (1, 9000, 5),
]


def _misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element behind an aligned address."""
    buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    view = buffer[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def _dense(device: str, *shape: int) -> Tensor:
    return (torch.rand(shape) < 0.5).to(device)


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 32), (2, 130, 96), (1, 9, 2048), (1, 9, 1056), (1, 5, 48), (1, 9, 1023), (2, 5, 1041), (1, 2, 70_000)],
    ids=str,
)
def test_pack_and_unpack(device: str, shape: tuple[int, int, int], misaligned: bool) -> None:
    """16 keys a thread where rows are whole words and aligned; otherwise 32 words of a row a warp."""
    dense = _dense(device, *shape)
    words = MASKS.pack_mask(dense)
    given = [_misaligned(dense), _misaligned(words)] if misaligned else [dense, words]
    assert torch.equal(ext.pack_mask(given[0]), words)
    assert torch.equal(ext.unpack_mask(given[1], shape[2]), dense)


@pytest.mark.parametrize("exact", [True, False], ids=["equal", "at-most"])
@pytest.mark.parametrize("lengths", [(63, 1023), (65, 1024), (130, 1025), (1, 70_000)], ids=str)
def test_several_blocks_of_ids(device: str, lengths: tuple[int, int], exact: bool) -> None:
    """A block takes 64 queries and 1024 keys."""
    q, k = (torch.randint(-3, 3, (2, n), device=device) for n in lengths)
    assert torch.equal(ext.id_mask(q, k, exact), MASKS.id_mask(q, k, exact))


@pytest.mark.parametrize("lowest_bit", range(1, 33))
def test_every_number_of_planes(device: str, lowest_bit: int) -> None:
    """Bits are settled from the highest plane down; a threshold's lowest set bit is the last plane of all."""
    for ratio in (2.0**-lowest_bit, 2.0**-lowest_bit + 2.0 ** -max(lowest_bit - 20, 1)):
        mask = AttentionMask.annealed(70, torch.tensor([ratio], device=device), seed=lowest_bit, step=3)
        expected = torch.from_numpy(annealed_allowed(70, min(ratio, 1.0), lowest_bit, 3))
        assert torch.equal(mask.to_dense()[0].cpu(), expected)


@pytest.mark.parametrize("length", [4100, 8200])
def test_several_words_a_thread(device: str, length: int) -> None:
    """From 8192 on a warp takes 128 words of a row instead of 32; a grid has at most 4 of them, then it loops."""
    scalars = (torch.tensor([value], device=device) for value in (2.0**-3, 5, 6))
    words = ext.annealed_mask(length, *scalars)[0].cpu().numpy().view(np.uint32)
    queries = np.array([0, 31, 32, 1023, 2047, 4095, 4096, length - 9, length - 2, length - 1])
    allowed = np.unpackbits(words[queries].view(np.uint8), axis=1, bitorder="little").astype(bool)
    assert not allowed[:, length:].any()
    assert np.array_equal(allowed[:, :length], annealed_allowed(length, 2.0**-3, 5, 6, queries))
    causal = np.arange(words.shape[1])[None] < (np.arange(length)[:, None] + 1) // 32  # wholly allowed words
    assert (words[causal] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("shape", SHAPES_OF_FRAGMENTS, ids=str)
def test_fragments_by_four_words(device: str, shape: tuple[int, int, int], misaligned: bool) -> None:
    """Rows of whole aligned fours of words are read by fours; a block takes 256 columns, or 256 rows transposed."""
    dense = _dense(device, *shape)
    words = MASKS.pack_mask(dense)
    given = _misaligned(words) if misaligned else words
    for transpose in (False, True):
        expected = MASKS.fragment_mask(words, shape[2], transpose)
        assert torch.equal(ext.fragment_mask(given, shape[2], transpose), expected)


@pytest.mark.parametrize("tile", [(5, 2100), (3, 1024), (200, 1030), (64, 33)], ids=str)
@pytest.mark.parametrize("value", [0, 1])
def test_tiles_of_many_words(device: str, tile: tuple[int, int], value: int) -> None:
    """A warp takes 32 words at a time, and four times that before it looks whether it has seen both values."""
    dense = torch.full((1, 200, 2085), bool(value), device=device)
    for q, k in ((199, 2084), (4, 1500), (130, 1024)):
        changed = dense.clone()
        changed[0, q, k] ^= True
        words = MASKS.pack_mask(changed)
        expected = MASKS.mask_tile_classes(words, 2085, *tile)
        assert int((expected == 2).sum()) == 1
        assert torch.equal(ext.mask_tile_classes(words, 2085, *tile), expected)
