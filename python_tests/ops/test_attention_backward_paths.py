# SPDX-License-Identifier: Apache-2.0
"""How the backward of csrc/attention sums dQ over tiles of keys: every element's place, the order, the memory."""

import itertools

import pytest
import torch
from allocations import peak_bytes
from attention_cases import Case, exact, inputs_of, run
from comparison import assert_all_equal
from torch import Tensor

from diffullama_ext import AttentionMask, annealed_attention, attention, ops
from diffullama_ext.modules import MaskedAttention

pytestmark = [pytest.mark.op("attention"), pytest.mark.ext, pytest.mark.usefixtures("attention_kernel")]

WIDTHS = (32, 64, 96, 128, 256)
BF16, F16 = torch.bfloat16, torch.float16
GRADIENTS = slice(2, 5)

# Tiles of keys that some queries skip, in the middle too; heads that share keys; paddings; ends within a tile.
ORDERED = {
    "none": Case(130, 330, 64, BF16, (2, 2)),
    "causal": Case(330, 330, 64, F16, (2, 1), "causal"),
    "blocks": Case(330, 330, 128, BF16, (2, 1), "blocks", batch=1),
    "documents": Case(330, 330, 64, BF16, (4, 2), "documents", batch=1),
    "documents, D 32": Case(400, 400, 32, F16, (2, 1), "documents", batch=1),
    "documents, D 96": Case(330, 330, 96, F16, (2, 1), "documents", batch=1),
    "bits": Case(200, 200, 128, F16, (1, 1), "bits of each", "left"),
    "padding": Case(150, 330, 64, BF16, (2, 1), "none", "right"),
    "causal padding": Case(330, 330, 128, BF16, (1, 1), "causal", "left"),
    "two launches": Case(150, 150, 256, BF16, (2, 1), "causal", "holes"),
    "two launches, documents": Case(200, 200, 256, F16, (1, 1), "documents", batch=1),
}


def holed(length: int, device: str) -> AttentionMask:
    """Queries skip every third tile of keys of 64, each row of tiles another."""
    tile = torch.arange(length, device=device) // 64
    return AttentionMask.from_dense(((tile[:, None] + tile) % 3 != 1)[None])


@pytest.mark.parametrize("q_length", [1, 17, 63, 64, 65, 130, 330])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_query_gets_its_gradient(device: str, width: int, q_length: int) -> None:
    """Against float64; of a size that no rounding makes up for a wrong place, a scale or a key left out."""
    i = inputs_of(Case(q_length, 150, width, F16, (2, 1), batch=1), device)
    truth = exact(i, scale=0.2)[GRADIENTS]
    for deterministic in (False, True):
        for got, true in zip(run(i, 0.2, deterministic=deterministic)[GRADIENTS], truth, strict=True):
            error = (got.double() - true).abs().max() / true.abs().max()
            assert error < 4e-3
            assert got.isfinite().all()


@pytest.mark.parametrize("name", ORDERED)
def test_in_order(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits again and again, and up to rounding those of any order; only dQ knows of the order."""
    i = inputs_of(ORDERED[name], device)
    ordered, free = run(i), run(i, deterministic=False)
    for blocks in (2, 5):
        monkeypatch.setenv("DIFFULLAMA_SIMULATED_BLOCKS", str(blocks))  # at the same time
        assert_all_equal(run(i), ordered)
    assert_all_equal([*free[:2], *free[3:]], [*ordered[:2], *ordered[3:]])
    spread = float((free[2].double() - ordered[2].double()).abs().max() / ordered[2].abs().max())
    assert spread <= 2 * torch.finfo(i.q.dtype).eps


@pytest.mark.parametrize(("width", "classes"), list(itertools.product(WIDTHS, (True, False))), ids=str)
def test_turns_count_the_key_tiles_that_visit(device: str, width: int, classes: bool) -> None:
    """A wrong count is waited for without end. Tiles that are skipped and tiles that add zeros give the same bits."""
    i = inputs_of(Case(330, 330, width, BF16, (2, 1), batch=1), device)
    mask = holed(330, device)
    tile_classes = mask.tile_classes(64, 64)
    assert (tile_classes == 0).any()
    options = (mask.words, tile_classes if classes else None, None, False, 0.1, True)
    with torch.no_grad():
        out, lse = torch.ops.diffullama.attention.default(i.q, i.k, i.v, *options)
        got = torch.ops.diffullama.attention_backward.default(i.upstream, i.q, i.k, i.v, out, lse, *options)
    assert_all_equal(got, run(i._replace(mask=mask), scale=0.1)[GRADIENTS])


def test_by_default_as_torch_is_told(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    i = inputs_of(Case(20, 20, 64, BF16), device)
    asked: list[bool] = []
    original = ops.attention.attention

    def spy(*args: object, deterministic: bool, **options: object) -> tuple[Tensor, Tensor]:
        asked.append(deterministic)
        return original(*args, deterministic=deterministic, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ops.attention, "attention", spy)

    def call(deterministic: bool | None) -> None:
        attention(*i[:3], deterministic=deterministic)
        annealed_attention(*i[:3], 0.5, seed=1, deterministic=deterministic)
        MaskedAttention(deterministic=deterministic)(*i[:3])

    for told in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda told=told: told)
        for deterministic in (None, False, True):
            call(deterministic)
            assert asked == 3 * [told if deterministic is None else deterministic]
            asked.clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU's allocations")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("width", [64, 256])
def test_memory(device: str, width: int, deterministic: bool) -> None:
    """float32 sums in whole tiles of 64 queries and 8 bytes a query beside the gradients; 4 bytes a tile for turns."""
    batch, heads, length = 1, 2, 200
    i = inputs_of(Case(length, length, width, BF16, (heads, 1), batch=batch), device)
    options = (None, None, None, True, 0.1, deterministic)
    with torch.no_grad():
        out, lse = torch.ops.diffullama.attention.default(i.q, i.k, i.v, *options)
        backward = torch.ops.diffullama.attention_backward.default
        used = peak_bytes(lambda: backward(i.upstream, i.q, i.k, i.v, out, lse, *options))
    gradients = 2 * sum(x.numel() for x in i[:3])
    sums, statistics = 4 * batch * heads * 256 * width, 8 * batch * heads * length
    turns = 4 * (1 + batch * heads * -(-length // 32)) if deterministic else 0
    assert used == gradients + sums + statistics + turns


def test_without_a_gradient_of_q(device: str) -> None:
    """Asking for some of the gradients changes none of them."""
    i = inputs_of(Case(130, 130, 64, BF16, (2, 1), "causal"), device)
    out = attention(i.q, i.k.detach(), i.v, i.mask, deterministic=True)
    assert isinstance(out, Tensor)
    dq, dv = torch.autograd.grad(out, (i.q, i.v), i.upstream)
    expected = run(i)
    assert_all_equal([dq, dv], [expected[2], expected[4]])
