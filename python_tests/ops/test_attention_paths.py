# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels do bit for bit: cheaper paths, layouts, repetition, zeros; and which path runs when."""

import itertools

import pytest
import torch
from attention_cases import Case, Inputs, inputs_of, run
from comparison import assert_all_equal, compiled_frames, strided
from torch import Tensor

from diffullama_ext import AttentionMask, annealed_attention, attention
from diffullama_ext.ops import attention_hopper
from diffullama_ext.ops.attention import path

pytestmark = [pytest.mark.op("attention"), pytest.mark.ext]

WIDTHS = (32, 64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


def bits(dense: Tensor) -> AttentionMask:
    return AttentionMask.from_dense(dense)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("width", WIDTHS)
def test_bits_equal_what_they_stand_for(device: str, width: int) -> None:
    """All ones is no mask, ones below the diagonal are causal: the same numbers in the same order."""
    i = inputs_of(Case(150, 150, width, torch.bfloat16, (2, 1), padding="right"), device)
    ones = torch.ones(1, 150, 150, dtype=torch.bool, device=device)
    pairs = ((None, bits(ones)), (AttentionMask.causal(150, device=device), bits(ones.tril())))
    for plain, with_bits in pairs:
        assert_all_equal(run(i._replace(mask=with_bits)), run(i._replace(mask=plain)))


@pytest.mark.usefixtures("attention_kernel")
def test_annealed_ends_are_causal_and_full(device: str) -> None:
    i = inputs_of(Case(130, 130, 64, torch.bfloat16), device)
    for ratio, mask in ((0.0, AttentionMask.causal(130, device=device)), (1.0, None)):
        expected = run(i._replace(mask=mask))[0]
        for given in (ratio, torch.tensor([ratio], device=device)):
            assert_all_equal([annealed_attention(i.q, i.k, i.v, given, seed=1).detach()], [expected])


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("mask", ["blocks", "documents", "annealed"])
@pytest.mark.parametrize("width", [64, 128])
def test_skipped_and_open_tiles_change_nothing(device: str, width: int, mask: str) -> None:
    """The op without tile classes looks at every bit."""
    i = inputs_of(Case(330, 330, width, torch.bfloat16, (1, 1), mask, batch=1), device)
    assert i.mask is not None
    classes = i.mask.tile_classes(64, 64)
    assert len(classes.unique()) > 1
    got = []
    for given in (classes, None):
        options = (i.mask.words, given, None, False, 0.1, True)
        with torch.no_grad():
            out, lse = torch.ops.diffullama.attention.default(i.q, i.k, i.v, *options)
            backward = torch.ops.diffullama.attention_backward.default
            got.append([out, lse, *backward(i.upstream, i.q, i.k, i.v, out, lse, *options)])
    assert_all_equal(*got)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("width", WIDTHS)
def test_support_of_probabilities(device: str, width: int) -> None:
    """With unit vectors for values (or upstream gradients, keys, queries) each entry shows itself in one element.

    out = P, dV = P^T, dQ = dS and dK = dS^T: all are 0 exactly where the mask forbids, P nowhere else.
    """
    allowed = torch.rand(1, width, width, device=device) < 0.5
    unit = torch.eye(width, dtype=torch.bfloat16, device=device)[None, None].requires_grad_()
    x, y, z = (torch.randn(1, 1, width, width, device=device).bfloat16().requires_grad_() for _ in range(3))
    mask, dense = bits(allowed), allowed[:, None]

    def values(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
        return run(Inputs(q, k, v, upstream.detach(), mask, None, allowed), scale=0.1)

    assert torch.equal(values(x, y, unit, z)[0] > 0, dense)
    assert torch.equal(values(x, y, z, unit)[4] > 0, dense.mT)
    for gradient, where in ((values(x, unit, y, z)[2], dense), (values(unit, x, y, z)[3], dense.mT)):
        assert (gradient[~where] == 0).all()
        assert (gradient[where] != 0).float().mean() > 0.98


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("width", [32, 96])
def test_layouts(device: str, width: int) -> None:
    """Heads after the length, slices of a fused projection, addresses and strides that no 16-byte copy can take."""
    b, h, length = 2, 3, 70
    i = inputs_of(Case(length, length, width, torch.float16, (h, h), "bits", "holes", b), device)
    expected = run(i)

    def slice_of(pad: int) -> tuple[Tensor, ...]:
        fused = torch.zeros(b, length, pad + 3 * h * width, dtype=torch.float16, device=device)
        parts = [p.unflatten(2, (h, width)).transpose(1, 2) for p in fused[..., pad:].split(h * width, dim=2)]
        for part, x in zip(parts, (i.q, i.k, i.v), strict=True):
            part.copy_(x.detach())
        return tuple(parts)

    every_other = tuple(strided(x.detach()) for x in (i.q, i.k, i.v))
    assert i.key_padding is not None
    for q, k, v in (slice_of(0), slice_of(8), slice_of(3), every_other):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        awkward = Inputs(*leaves, strided(i.upstream), i.mask, strided(i.key_padding), i.allowed)
        assert_all_equal(run(awkward), expected)


@pytest.mark.usefixtures("attention_kernel")
def test_expanded_heads_and_batch(device: str) -> None:
    """Strides of 0."""
    i = inputs_of(Case(40, 40, 64, torch.bfloat16, (4, 4), "bits"), device)
    wide = [x.detach()[:1, :1].expand(2, 4, -1, -1).requires_grad_() for x in (i.q, i.k, i.v)]
    plain = [x.detach().contiguous().requires_grad_() for x in wide]
    assert_all_equal(*(run(i._replace(q=q, k=k, v=v)) for q, k, v in (wide, plain)))


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize(("width", "dtype"), list(itertools.product(WIDTHS, DTYPES)), ids=str)
def test_rows_with_nothing_allowed(device: str, width: int, dtype: torch.dtype) -> None:
    """Zeros, logsumexp -inf and zero gradients whatever their upstream gradient; nothing leaks into other rows."""
    i = inputs_of(Case(140, 140, width, dtype, (2, 1), padding="right"), device)
    allowed = torch.rand(1, 140, 140, device=device) < 0.5
    allowed[:, 10:90] = False  # a whole tile of queries and parts of others
    allowed[:, :, 70:] = False
    key_padding = i.key_padding
    assert key_padding is not None
    key_padding[1] = False
    dead = torch.zeros(2, 140, dtype=torch.bool, device=device)
    dead[0, 10:90] = dead[1] = True
    upstream = i.upstream.masked_fill(dead[:, None, :, None], 1e4)
    out, lse, dq, dk, dv = run(i._replace(mask=bits(allowed), upstream=upstream))
    where = dead[:, None].expand(2, 2, 140)
    assert (out[where] == 0).all()
    assert torch.equal(lse == -torch.inf, where)
    assert (dq[where] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    for gradient in (dk, dv):
        assert (gradient[1] == 0).all()
        assert (gradient[0, :, 70:] == 0).all(), "nothing attends to these keys"
        assert (gradient[0, :, :70] != 0).any()


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize(("width", "dtype"), list(itertools.product(WIDTHS, DTYPES)), ids=str)
def test_deterministic(device: str, width: int, dtype: torch.dtype) -> None:
    i = inputs_of(Case(150, 150, width, dtype, (2, 1), "annealed", "left", batch=1), device)
    assert_all_equal(run(i), run(i))


@pytest.mark.usefixtures("attention_kernel")
def test_a_sequence_does_not_depend_on_its_batch(device: str) -> None:
    i = inputs_of(Case(90, 90, 64, torch.bfloat16, (2, 1), "bits of each", "left", batch=3), device)
    together = run(i)
    assert i.key_padding is not None
    for b in range(3):
        q, k, v = (x.detach()[b : b + 1].requires_grad_() for x in (i.q, i.k, i.v))
        mask = bits(i.allowed[b : b + 1])
        alone = Inputs(q, k, v, i.upstream[b : b + 1], mask, i.key_padding[b : b + 1], i.allowed[b : b + 1])
        assert_all_equal([x[b : b + 1] for x in together], run(alone))


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("magnitude", [2.0**-12, 300.0])
def test_scores_far_outside_the_range_of_exp(device: str, magnitude: float) -> None:
    """Up to 1e6 and down to 1e-6: the softmax is that of float64."""
    i = inputs_of(Case(80, 80, 64, torch.float16, (2, 2), "bits"), device)
    q, k = ((magnitude * x).detach().requires_grad_() for x in (i.q, i.k))
    out, lse = run(i._replace(q=q, k=k))[:2]
    scores = (q.double() @ k.double().mT / 8).masked_fill(~i.allowed[:, None], -torch.inf)
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), torch.softmax(scores, -1) @ i.v.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    batch, q_length, k_length = shape
    i = inputs_of(Case(q_length, k_length, 64, torch.bfloat16, (2, 1), batch=batch), device)
    out, lse, *gradients = run(i)
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in (out, *gradients))


@pytest.mark.usefixtures("attention_kernel")
def test_compiles_once_for_all_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFULLAMA_IMPL", "ext")
    i = inputs_of(Case(70, 70, 64, torch.bfloat16, (4, 2)), device)

    def step(q: Tensor, k: Tensor, v: Tensor, ratio: Tensor, seed: Tensor, step: Tensor) -> Tensor:
        return annealed_attention(q, k, v, ratio, seed=seed, step=step, impl="ext")

    def check(got: Tensor, eager: Tensor) -> None:
        assert_all_equal(*([x.detach(), *torch.autograd.grad(x, i[:3], i.upstream)] for x in (got, eager)))

    calls = [(*i[:3], *(torch.tensor([x], device=device) for x in (0.2 * n, n, 3 * n))) for n in range(4)]
    assert compiled_frames(step, calls, check) == 1


# --- which path runs -------------------------------------------------------------------------------------------------


def empty(device: str, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(1, 1, 1, width, dtype=dtype, device=device)


@pytest.mark.usefixtures("attention_kernel")
def test_path_by_dtype_and_width(device: str) -> None:
    assert path(empty(device)) == "portable"
    assert path(empty(device, dtype=torch.float32)) == "reference"
    assert path(empty(device, width=80)) == "reference"


@pytest.mark.usefixtures("attention_kernel")
def test_forced_path(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    i = inputs_of(Case(33, 33, 64, torch.bfloat16, mask="bits"), device)
    by_default = run(i)
    monkeypatch.setenv("DIFFULLAMA_ATTENTION", "portable")
    assert_all_equal(run(i), by_default)
    with pytest.raises(ValueError, match=r"=portable takes float16 and bfloat16 .* 256, got torch.float32 of 64"):
        attention(*(x.float() for x in i[:3]))
    monkeypatch.setenv("DIFFULLAMA_ATTENTION", "reference")
    assert_all_equal(run(i), run(i, impl="reference"))
    monkeypatch.setenv("DIFFULLAMA_ATTENTION", "hopper")
    monkeypatch.setattr(attention_hopper, "runs_on", lambda device: False)
    with pytest.raises(RuntimeError, match=r"DIFFULLAMA_ATTENTION=hopper: this build has no such path on"):
        run(i)


def test_wrong_name_of_a_path(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFULLAMA_ATTENTION", "fast")
    with pytest.raises(ValueError, match="DIFFULLAMA_ATTENTION must be portable, hopper or reference, got 'fast'"):
        attention(*3 * [empty(device)])


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (torch.float32, 1, 2, 5, 64)}, "q must be float16 or bfloat16"),
        ({"k": (torch.float16, 1, 2, 5, 64)}, "k has the wrong dtype"),
        ({"q": (torch.bfloat16, 1, 2, 5, 40), "k": (torch.bfloat16, 1, 2, 5, 40)}, "v must have shape"),
        ({"words": (torch.int32, 3, 5, 1)}, "words must hold 1 or 1 masks, got 3"),
        ({"words": (torch.int32, 1, 5, 2)}, r"words must have shape \[ \* 5 1 \], got \[ 1 5 2 \]"),
        ({"tile_classes": (torch.uint8, 1, 1, 1)}, "tile_classes come with words"),
        ({"key_padding": (torch.bool, 1, 6)}, "key_padding must have shape"),
    ],
)
def test_the_op_itself_rejects(device: str, change: dict[str, tuple], message: str) -> None:
    """A direct call touches no memory that it should not."""
    shapes = {name: (torch.bfloat16, 1, 2, 5, 64) for name in ("q", "k", "v")} | change
    given = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, *shape) in shapes.items()}
    arguments = {"words": None, "tile_classes": None, "key_padding": None} | given
    with pytest.raises(ValueError, match=message):
        torch.ops.diffullama.attention.default(**arguments, causal=False, scale=1.0, deterministic=False)
