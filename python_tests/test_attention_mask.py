# SPDX-License-Identifier: Apache-2.0
"""AttentionMask: every constructor against the dense mask it stands for, the named kinds, and the algebra."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from comparison import strided
from oracles import annealed_allowed
from torch import Tensor

from diffullama_ext import AttentionMask

pytestmark = pytest.mark.op("id_mask")


def _dense(rule: Callable[[int, int], bool], q_length: int, k_length: int) -> Tensor:
    return torch.tensor([[rule(q, k) for k in range(k_length)] for q in range(q_length)], dtype=torch.bool)


@pytest.mark.parametrize("length", [1, 32, 45])
def test_named_kinds(impl: str, device: str, length: int) -> None:
    causal = AttentionMask.causal(length, device=device)
    assert causal.kind == "causal"
    assert torch.equal(causal.to_dense()[0].cpu(), _dense(lambda q, k: k <= q, length, length))
    full = AttentionMask.full(length, length + 3, device=device)
    assert (full.kind, full.q_length, full.k_length) == ("full", length, length + 3)
    assert torch.equal(full.to_dense().cpu(), torch.ones(1, length, length + 3, dtype=torch.bool))
    assert AttentionMask.full(length).k_length == length
    assert causal.words.device.type == device
    assert causal.words.dtype == torch.int32


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
def test_annealed(impl: str, device: str, as_tensor: bool) -> None:
    def mask(ratio: float, seed: int, step: int) -> AttentionMask:
        if not as_tensor:
            return AttentionMask.annealed(37, ratio, seed=seed, step=step, device=device)
        ratio_tensor, *keys = (torch.tensor([x], device=device) for x in (ratio, seed, step))
        return AttentionMask.annealed(37, ratio_tensor, seed=keys[0], step=keys[1])

    drawn = mask(0.4, 5, 9)
    assert drawn.kind == "bits"
    assert torch.equal(drawn.to_dense()[0].cpu(), torch.from_numpy(annealed_allowed(37, 0.4, 5, 9)))
    zero, one = mask(0.0, 5, 9), mask(1.0, 5, 9)
    assert (zero.kind, one.kind) == (("bits", "bits") if as_tensor else ("causal", "full"))
    assert torch.equal(zero.to_dense(), AttentionMask.causal(37, device=device).to_dense())
    assert torch.equal(one.to_dense(), AttentionMask.full(37, device=device).to_dense())
    others = [mask(0.4, 6, 9), mask(0.4, 5, 10)]
    assert not any(torch.equal(drawn.words, other.words) for other in others), "seed and step key the draw"


def test_id_masks(impl: str, device: str) -> None:
    ids = [0, 0, 1, 1, 1, 2]
    block = AttentionMask.block_causal(torch.tensor(ids, device=device))
    assert torch.equal(block.to_dense()[0].cpu(), _dense(lambda q, k: ids[k] <= ids[q], 6, 6))
    documents = AttentionMask.documents(torch.tensor(ids, device=device))
    assert torch.equal(documents.to_dense()[0].cpu(), _dense(lambda q, k: ids[k] == ids[q], 6, 6))
    cached = AttentionMask.block_causal(torch.tensor(ids[4:], device=device), torch.tensor(ids, device=device))
    assert (cached.q_length, cached.k_length) == (2, 6)
    assert torch.equal(cached.to_dense(), block.to_dense()[:, 4:])
    batch = AttentionMask.documents(torch.tensor([ids, ids[::-1]], device=device))
    assert batch.words.shape == (2, 6, 1)
    assert torch.equal(batch.to_dense()[1], documents.to_dense()[0].flip(0, 1))


def test_prefix_lm_is_block_causal(impl: str, device: str) -> None:
    prefix = 3
    ids = torch.arange(7, device=device).clamp(min=prefix - 1)
    expected = _dense(lambda q, k: k <= q or k < prefix, 7, 7)
    assert torch.equal(AttentionMask.block_causal(ids).to_dense()[0].cpu(), expected)


@pytest.mark.parametrize("shape", [(5, 40), (1, 5, 40), (3, 5, 40)], ids=str)
def test_from_dense_round_trip(impl: str, device: str, shape: tuple[int, ...]) -> None:
    allowed = torch.rand(shape, device=device) < 0.5
    for given in (allowed, strided(allowed)):
        mask = AttentionMask.from_dense(given)
        assert (mask.q_length, mask.k_length) == (5, 40)
        assert torch.equal(mask.to_dense(), allowed.reshape(-1, 5, 40))


def test_and_or(impl: str, device: str) -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]], device=device)
    a, b = AttentionMask.causal(5, device=device), AttentionMask.documents(ids)
    for combined, expected in ((a & b, a.to_dense() & b.to_dense()), (a | b, a.to_dense() | b.to_dense())):
        assert combined.kind == "bits"
        assert torch.equal(combined.to_dense(), expected)
    assert torch.equal((a | AttentionMask.full(5, device=device)).to_dense()[0], torch.ones_like(expected[0]))


def test_to_device_keeps_the_mask(impl: str, device: str) -> None:
    made_on_cpu = [AttentionMask.causal(9), AttentionMask.annealed(9, 0.5, seed=1)]
    for mask in made_on_cpu:
        moved = mask.to(device)
        assert (moved.kind, moved.device.type, moved.words.device.type) == (mask.kind, device, device)
        assert torch.equal(moved.to_dense().cpu(), mask.to_dense())


def test_repr_says_what_it_is(impl: str, device: str) -> None:
    assert repr(AttentionMask.causal(4, device=device)).startswith("AttentionMask(causal, [1, 4, 4]")
    batch = AttentionMask.documents(torch.zeros(2, 5, dtype=torch.int64, device=device))
    assert repr(batch).startswith("AttentionMask(bits, [2, 5, 5]")


def _ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


REJECTED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: AttentionMask.causal(-1), ValueError, r"^length must be in \[0, .*\], got -1"),
    (lambda: AttentionMask.annealed(cast(int, 6.0), 0.5, seed=0), TypeError, r"^length must be an int, got 6.0"),
    (lambda: AttentionMask.full(-1), ValueError, r"^q_length must be in \[0, .*\], got -1"),
    (lambda: AttentionMask.full(4, -2), ValueError, r"^k_length must be in \[0, .*\], got -2"),
    (lambda: AttentionMask.annealed(4, 1.5, seed=0), ValueError, r"^attn_mask_ratio must be in \[0, 1\], got 1.5"),
    (lambda: AttentionMask.annealed(4, -0.1, seed=0), ValueError, r"^attn_mask_ratio must be in \[0, 1\], got -0.1"),
    (lambda: AttentionMask.annealed(4, float("nan"), seed=0), ValueError, r"^attn_mask_ratio must .*, got nan"),
    (lambda: AttentionMask.annealed(4, torch.zeros(2), seed=0), ValueError, r"^attn_mask_ratio must have one element"),
    (lambda: AttentionMask.annealed(4, _ids(1), seed=0), TypeError, r"^attn_mask_ratio must be float32, got int64"),
    (lambda: AttentionMask.annealed(4, 0.5, seed=cast(int, 0.5)), TypeError, r"^seed must be an int, got 0.5"),
    (lambda: AttentionMask.annealed(4, 0.5, seed=0, step=2**64), ValueError, r"^step must fit 64 bits, got 1844"),
    (lambda: AttentionMask.from_dense(torch.ones(4, 4)), TypeError, r"^allowed must be bool\[M, Lq, Lk\], got float32"),
    (
        lambda: AttentionMask.from_dense(_ids(4).bool()),
        ValueError,
        r"^allowed must be bool\[M, Lq, Lk\], got bool\[4\]",
    ),
    (
        lambda: AttentionMask.two_streams(cast(Tensor, [0, 0, 1])),
        TypeError,
        r"block_ids must be a tensor int64, got list",
    ),
    (lambda: AttentionMask.two_streams(_ids(4).int()), TypeError, r"block_ids must be int64, got int32"),
    (lambda: AttentionMask.documents(torch.zeros(4)), TypeError, r"ids must be int64\[B, L\], got float32\[1, 4\]"),
    (lambda: AttentionMask.documents(_ids(1, 2, 3)), ValueError, r"ids must be int64\[B, L\], got int64\[1, 2, 3\]"),
    (lambda: AttentionMask.block_causal(_ids(4), _ids(2, 4)), ValueError, r"one batch size, got 1 and 2"),
    (lambda: AttentionMask.causal(4) & AttentionMask.causal(5), ValueError, r"^masks must .*\[1, 4, 4\].*\[1, 5, 5\]"),
    (lambda: AttentionMask.full(4, 5) | AttentionMask.full(4, 6), ValueError, r"^masks must have one shape"),
    (
        lambda: AttentionMask.documents(_ids(2, 4)) & AttentionMask.documents(_ids(3, 4)),
        ValueError,
        r"^masks must .*\[2, 4, 4\].*\[3, 4, 4\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REJECTED, ids=[row[2][:40] for row in REJECTED])
def test_rejects_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_lengths_may_be_traced() -> None:
    def n_allowed(x: Tensor) -> Tensor:
        length = x.shape[0]
        return (
            AttentionMask.annealed(length, 0.5, seed=1, step=2).to_dense().sum()
            + AttentionMask.full(length).words.sum()
        )

    compiled = torch.compile(n_allowed, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9, 40):
        x = torch.zeros(length)
        assert torch.equal(compiled(x), n_allowed(x))
