# SPDX-License-Identifier: Apache-2.0
"""Attention on sm_90a, forward and backward: accuracy, exact equalities, layouts, choice of the path."""

import pytest
import torch
from attention_cases import MASK_CLASSES, PADDINGS, Case, assert_accurate, inputs_of, run
from comparison import assert_all_equal, strided
from torch import Tensor

from diffullama_ext import AttentionMask, attention
from diffullama_ext.ops import attention_hopper
from diffullama_ext.ops.attention import path

pytestmark = [pytest.mark.op("attention_hopper"), pytest.mark.ext]

BF16, F16 = torch.bfloat16, torch.float16
OP = torch.ops.diffullama.attention_hopper.default
BACKWARD = torch.ops.diffullama.attention_hopper_backward.default


@pytest.fixture(autouse=True)
def _forced(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not attention_hopper.runs_on(torch.device(device)):
        pytest.skip("no sm_90, and not simulated")
    monkeypatch.setenv("DIFFULLAMA_ATTENTION", "hopper")


@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 127, 128, 129, 193, 330])
@pytest.mark.parametrize(("width", "dtype"), [(128, BF16), (64, F16)], ids=str)
def test_every_length(device: str, length: int, width: int, dtype: torch.dtype) -> None:
    masks = ("annealed", "none", "causal", "bits of each")
    i = inputs_of(Case(length, length, width, dtype, (2, 1), masks[length % 4], PADDINGS[length % 3], batch=2), device)
    assert_accurate(i)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASK_CLASSES)
def test_every_mask(device: str, mask: str, padding: str) -> None:
    assert_accurate(inputs_of(Case(290, 290, 64, BF16, (1, 1), mask, padding), device))


@pytest.mark.parametrize("lengths", [(1, 300), (300, 1), (40, 210), (210, 40)], ids=str)
def test_queries_and_keys_of_other_lengths(device: str, lengths: tuple[int, int]) -> None:
    for mask, padding in (("none", ""), ("bits of each", "left"), ("blocks", "right")):
        assert_accurate(inputs_of(Case(*lengths, 128, F16, (2, 1), mask, padding), device))


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)], ids=str)
def test_grouped_heads(device: str, heads: tuple[int, int]) -> None:
    assert_accurate(inputs_of(Case(70, 130, 64, BF16, heads, "bits"), device))


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
def test_scale(device: str, scale: float) -> None:
    assert_accurate(inputs_of(Case(100, 100, 128, F16, (2, 2), "dead rows", "holes"), device), scale)


@pytest.mark.parametrize("width", [64, 128])
def test_bits_equal_what_they_stand_for(device: str, width: int) -> None:
    """All ones is no mask, ones below the diagonal are causal, with and without tile classes: bit for bit."""
    i = inputs_of(Case(260, 260, width, BF16, (2, 1), batch=1), device)
    q, k, v = (x.detach() for x in i[:3])
    ones = torch.ones(1, 260, 260, dtype=torch.bool, device=device)
    for causal, dense in ((False, ones), (True, ones.tril())):
        mask = AttentionMask.from_dense(dense)
        words, fragments, transposed = mask.words, mask.fragments(), mask.fragments(transpose=True)
        plain = OP(q, k, v, None, None, None, None, causal, 0.1, False)
        assert_all_equal(OP(q, k, v, words, fragments, mask.tile_classes(64, 64), None, False, 0.1, False), plain)
        assert_all_equal(OP(q, k, v, words, fragments, None, None, False, 0.1, False), plain)
        given = (i.upstream, q, k, v, *plain)
        gradients = BACKWARD(*given, None, None, None, None, causal, 0.1, True)
        for classes in (mask.tile_classes(64, 64), None):
            assert_all_equal(BACKWARD(*given, words, transposed, classes, None, False, 0.1, True), gradients)


def test_rows_with_nothing_allowed(device: str) -> None:
    allowed = torch.rand(1, 260, 260, device=device) < 0.5
    allowed[:, 10:210] = False  # whole tiles of queries and parts of others
    i = inputs_of(Case(260, 260, 128, F16, (1, 1), batch=1), device)
    out, lse, *gradients = run(i._replace(mask=AttentionMask.from_dense(allowed)))
    assert (out[:, :, 10:210] == 0).all()
    assert (lse[:, :, 10:210] == -torch.inf).all()
    assert lse[:, :, 210:].isfinite().all()
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert (gradients[0][:, :, 10:210] == 0).all()


@pytest.mark.parametrize("width", [64, 128])
def test_gradients_flow_where_the_mask_allows(device: str, width: int) -> None:
    """dV of a one-hot upstream gradient is a row of P: above 0 exactly where the mask and the padding allow."""
    i = inputs_of(Case(150, 260, width, F16, (1, 1), "bits of each", "holes"), device)
    for query in (0, 63, 64, 127, 128, 149):
        upstream = torch.zeros_like(i.upstream)
        upstream[:, :, query, 0] = 1.0
        scale = 0.01  # no probability is rounded to 0
        *_, dv = run(i._replace(upstream=upstream), scale)
        assert torch.equal(dv[:, 0, :, 0] > 0, i.allowed[:, query])
        assert (dv[..., 1:] == 0).all()


@pytest.mark.parametrize("width", [64, 128])
def test_any_order_of_sums(device: str, width: int) -> None:
    """Without `deterministic`, only dQ may differ, by the rounding of its sums."""
    i = inputs_of(Case(300, 450, width, BF16, (4, 2), "bits of each", "left"), device)
    assert_accurate(i)
    (*ordered, dk, dv), (*got, dk2, dv2) = run(i), run(i, deterministic=False)
    assert_all_equal([*got[:2], dk2, dv2], [*ordered[:2], dk, dv])
    torch.testing.assert_close(got[2], ordered[2], rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("mask", ["blocks", "bits of each"])
@pytest.mark.parametrize("width", [64, 128])
def test_sums_in_order(device: str, width: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that run together wait for their turns, which skipped tiles do not take."""
    i = inputs_of(Case(300, 700, width, F16, (2, 1), mask, "left"), device)
    expected = run(i)
    for blocks in (2, 3):
        monkeypatch.setenv("DIFFULLAMA_SIMULATED_BLOCKS", str(blocks))
        assert_all_equal(run(i), expected)


def test_transposed_fragments_are_made_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mask, for a call that has a backward; the op itself does without."""
    i = inputs_of(Case(70, 70, 64, F16, (2, 2), "bits"), device)
    assert i.mask is not None
    made = []
    fragments = AttentionMask.fragments
    monkeypatch.setattr(
        AttentionMask, "fragments", lambda m, transpose=False: made.append(transpose) or fragments(m, transpose)
    )
    attention(*(x.detach() for x in i[:3]), i.mask)
    assert made == [False]
    expected = run(i, 0.1)
    assert made == [False, False, True]
    words, classes = i.mask.words, i.mask.tile_classes(64, 64)
    out, _ = OP(i.q, i.k, i.v, words, fragments(i.mask), classes, None, False, 0.1, True)
    assert_all_equal(torch.autograd.grad(out, i[:3], i.upstream), expected[2:])


def test_layouts(device: str) -> None:
    """Heads after the length, rows that TMA cannot address, and strides of 0."""
    i = inputs_of(Case(70, 70, 64, F16, (2, 2), "bits"), device)
    expected = run(i)

    def heads_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for change in (heads_last, strided):
        q, k, v = (change(x.detach()).requires_grad_() for x in i[:3])
        assert_all_equal(run(i._replace(q=q, k=k, v=v, upstream=change(i.upstream))), expected)
    wide = [x.detach()[:1, :1].expand(2, 2, -1, -1).requires_grad_() for x in i[:3]]
    plain = [x.detach().contiguous().requires_grad_() for x in wide]
    assert_all_equal(*(run(i._replace(q=q, k=k, v=v)) for q, k, v in (wide, plain)))


def test_deterministic(device: str) -> None:
    case = Case(200, 200, 128, BF16, (2, 1), "annealed", "left")
    first, second = (run(inputs_of(case, device)) for _ in range(2) if torch.manual_seed(3))
    assert_all_equal(first, second)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    batch, q_length, k_length = shape
    out, lse, *gradients = run(inputs_of(Case(q_length, k_length, 64, BF16, (2, 1), batch=batch), device))
    assert (lse == -torch.inf).all()
    assert (out == 0).all()
    assert all((x == 0).all() for x in gradients)


def test_opcheck(device: str) -> None:
    i = inputs_of(Case(20, 20, 64, BF16, (2, 1), "bits", "left"), device)
    assert i.mask is not None
    rest = (i.mask.tile_classes(64, 64), i.key_padding, False, 0.25, True)
    torch.library.opcheck(OP, (*i[:3], i.mask.words, i.mask.fragments(), *rest))
    with torch.no_grad():
        out = OP(*i[:3], i.mask.words, i.mask.fragments(), *rest)
    inputs = (i.upstream, *(x.detach() for x in i[:3]), *out)
    torch.library.opcheck(BACKWARD, (*inputs, i.mask.words, i.mask.fragments(transpose=True), *rest))


def test_path(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 1, 1, 128, dtype=BF16, device=device)
    assert path(q) == "hopper"
    with pytest.raises(ValueError, match=r"=hopper takes float16 and bfloat16 .* 64, 128, got torch.bfloat16 of 96"):
        path(q[..., :96])
    monkeypatch.delenv("DIFFULLAMA_ATTENTION")
    assert path(q) == "portable", "until it has been measured"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fragments": (torch.int32, 1, 1, 1, 128, 2)}, "words and fragments come together"),
        ({"words": (torch.int32, 1, 5, 1)}, "words and fragments come together"),
        (
            {"words": (torch.int32, 1, 5, 1), "fragments": (torch.int32, 1, 2, 1, 128, 2)},
            r"fragments must have shape \[ 1 1 1 128 2 \], got \[ 1 2 1 128 2 \]",
        ),
        ({"q": (BF16, 1, 2, 5, 96), "k": (BF16, 1, 2, 5, 96), "v": (BF16, 1, 2, 5, 96)}, "must be 64 or 128, got 96"),
    ],
)
def test_the_op_itself_rejects(device: str, change: dict[str, tuple], message: str) -> None:
    shapes = {name: (BF16, 1, 2, 5, 64) for name in ("q", "k", "v")} | change
    given = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, *shape) in shapes.items()}
    arguments = dict.fromkeys(("words", "fragments", "tile_classes", "key_padding")) | given
    with pytest.raises(ValueError, match=message):
        OP(**arguments, causal=False, scale=1.0, deterministic=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": (torch.int32, 1, 5, 3)}, "words and transposed_fragments come together"),
        (
            {"words": (torch.int32, 1, 5, 3), "transposed_fragments": (torch.int32, 1, 1, 2, 128, 2)},
            r"transposed_fragments must have shape \[ 1 2 1 128 2 \], got \[ 1 1 2 128 2 \]",
        ),
        ({"lse": (torch.float32, 1, 2, 6)}, r"lse must have shape \[ 1 2 5 \]"),
    ],
)
def test_the_backward_itself_rejects(device: str, change: dict[str, tuple], message: str) -> None:
    rows = {"dout": 5, "q": 5, "k": 70, "v": 70, "out": 5}
    shapes = {name: (BF16, 1, 2, n, 64) for name, n in rows.items()} | {"lse": (torch.float32, 1, 2, 5)} | change
    given = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, *shape) in shapes.items()}
    arguments = dict.fromkeys(("words", "transposed_fragments", "tile_classes", "key_padding")) | given
    with pytest.raises(ValueError, match=message):
        BACKWARD(**arguments, causal=False, scale=1.0, deterministic=False)
