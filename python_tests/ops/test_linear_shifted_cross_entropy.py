# SPDX-License-Identifier: Apache-2.0
"""linear_shifted_cross_entropy: the loss of hidden @ weight.T + bias without those logits."""

from typing import Any

import pytest
import torch
from comparison import (
    BadInput,
    assert_all_equal,
    assert_no_worse_than_torch,
    bad_inputs,
    compiled_frames,
    elsewhere,
    strided,
    zeros,
)
from loss_cases import OPTIONS, REDUCTIONS, Case, as_dtype, linear_case
from oracles import denominator, dense_nll
from torch import Tensor

from diffullama_ext import linear_shifted_cross_entropy, shifted_cross_entropy

pytestmark = pytest.mark.op("linear_shifted_cross_entropy")

# B, L, H, V
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (3, 33, 16, 130), (1, 64, 8, 1001), (4, 0, 2, 3), (0, 5, 2, 3)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(
    impl: str, device: str, shape: tuple[int, int, int, int], shift: bool, option: str, reduction: str
) -> None:
    case = linear_case(*shape, device)
    options: dict[str, Any] = OPTIONS[option]
    loss = case.loss(shift=shift, reduction=reduction, impl=impl, **options)
    each = case.loss_weight * dense_nll(case.logits(), case.x0, case.masked, shift, **options)
    tokens = denominator("tokens", case.masked, None, shift)
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / (tokens or [1])[0]}[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-11)
    upstream = torch.randn_like(expected)  # for "none" another gradient for every token
    for got, want in zip(case.gradients(loss, upstream), case.gradients(expected, upstream), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_stats(impl: str, device: str, reduction: str) -> None:
    case = linear_case(3, 9, 4, 6, device)
    _, stats = linear_shifted_cross_entropy(
        case.hidden, case.weight, case.x0, case.masked, loss_weight=case.loss_weight, reduction=reduction, impl=impl
    )
    nll = dense_nll(case.hidden @ case.weight.T, case.x0, case.masked, True)
    weighted = (case.loss_weight * nll).sum()
    torch.testing.assert_close(stats.weighted_sum, weighted)
    torch.testing.assert_close(stats.nll_sum, nll.detach().sum())
    assert int(stats.n_scored) == int(case.masked[:, 1:].sum())
    assert [stats.weighted_sum.requires_grad, stats.nll_sum.requires_grad] == [True, False]
    got, expected = (
        torch.autograd.grad(x, case.weight)[0] for x in (stats.weighted_sum, (case.loss_weight * nll).sum())
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("maskable", [True, False], ids=["maskable", "all"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch"])
def test_normalizers(impl: str, device: str, normalizer: str, shift: bool, maskable: bool) -> None:
    case = linear_case(3, 9, 4, 6, device)
    case.masked[2] = False
    able = (case.masked | (torch.rand(3, 9, device=device) < 0.5)) if maskable else None
    loss = case.loss(maskable=able, shift=shift, normalizer=normalizer, impl=impl)
    below = torch.tensor(denominator(normalizer, case.masked, able, shift), dtype=torch.float64, device=device)
    nll = dense_nll(case.logits(), case.x0, case.masked, shift)
    expected = ((case.loss_weight * nll).sum(dim=1) / below).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(case.gradients(3 * loss), case.gradients(3 * expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_independent_of_chunk_rows(impl: str, device: str, reduction: str) -> None:
    case = linear_case(3, 20, 8, 37, device)
    whole = case.loss(reduction=reduction, impl=impl)
    upstream = torch.randn_like(whole)
    gradients = case.gradients(whole, upstream)
    for chunk_rows in (1, 2, 7, 29, 10_000):
        loss = case.loss(reduction=reduction, chunk_rows=chunk_rows, impl=impl)
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
        for got, want in zip(case.gradients(loss, upstream), gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_max_scored(impl: str, device: str, reads_values: bool, reduction: str) -> None:
    """A bound that holds changes nothing, even the tight one; one that does not raises, and is NaN on CUDA."""
    case = linear_case(3, 9, 4, 6, device)
    scored = int(case.masked[:, 1:].sum())
    expected = case.loss(reduction=reduction, impl=impl)
    upstream = torch.randn_like(expected)
    gradients = case.gradients(expected, upstream)
    for bound in (scored, scored + 1, 10**9):
        loss = case.loss(reduction=reduction, max_scored=bound, impl=impl)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for got, want in zip(case.gradients(loss, upstream), gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    if reads_values:
        with pytest.raises(ValueError, match=rf"^max_scored must be at least .*\b{scored}\b.*, got {scored - 1}"):
            case.loss(reduction=reduction, max_scored=scored - 1, impl=impl)
    else:
        assert case.loss(reduction=reduction, max_scored=scored - 1, impl=impl).isnan().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "nothing"])
def test_partly_frozen(impl: str, device: str, trained: str, reduction: str) -> None:
    case = linear_case(2, 9, 4, 6, device)
    expected = case.gradients(case.loss(reduction=reduction, impl="reference").sum())
    frozen = case._replace(hidden=case.hidden.detach(), weight=case.weight.detach(), bias=case.bias.detach())
    if trained == "nothing":
        assert not frozen.loss(reduction=reduction, impl=impl).requires_grad
        return
    part = frozen._replace(**{trained: getattr(case, trained)})
    (got,) = torch.autograd.grad(part.loss(reduction=reduction, impl=impl).sum(), getattr(case, trained))
    torch.testing.assert_close(got, expected[["hidden", "weight", "bias"].index(trained)], rtol=1e-10, atol=1e-12)


@pytest.mark.ext
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_reference(device: str, option: str, reduction: str) -> None:
    case = linear_case(2, 70, 64, 1003, device, torch.float32)
    options: dict[str, Any] = OPTIONS[option]
    values = []
    for impl in ("ext", "reference"):
        loss = case.loss(reduction=reduction, impl=impl, **options)
        values.append([loss, *case.gradients(loss.sum())])
    for ours, expected in zip(*values, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_torch(impl: str, device: str, dtype: torch.dtype, reduction: str) -> None:
    case = linear_case(2, 40, 64, 515, device, dtype)
    exact = as_dtype(case, torch.float64)
    truth = dense_nll(exact.logits(), case.x0, case.masked, True) * case.loss_weight
    low = dense_nll(case.logits().float(), case.x0, case.masked, True) * case.loss_weight
    loss = case.loss(reduction=reduction, impl=impl)
    assert loss.dtype == torch.float32
    if reduction == "none":
        assert_no_worse_than_torch(loss.detach(), truth.detach(), low.detach())
    triples = zip(
        case.gradients(loss.sum()), exact.gradients(truth.sum()), case.gradients(low.sum().float()), strict=True
    )
    for ours, wanted, plain in triples:
        assert ours.dtype == dtype
        assert_no_worse_than_torch(ours, wanted, plain)


def test_weight_gradient_accumulates_wide(impl: str, device: str) -> None:
    """Many small contributions to one row survive in bfloat16: they are summed before they are rounded."""
    rows = 4096
    hidden = torch.full((1, rows, 1), 0.125, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, device=device, dtype=torch.bfloat16).requires_grad_()
    x0 = torch.zeros(1, rows, dtype=torch.int64, device=device)
    masked = torch.ones_like(x0, dtype=torch.bool)
    loss, _ = linear_shifted_cross_entropy(
        hidden, weight, x0, masked, shift=False, reduction="sum", chunk_rows=1, impl=impl
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.flatten().tolist() == [-0.0625 * rows, 0.0625 * rows]  # each row adds -+ 0.5 * 0.125


@pytest.mark.parametrize("chunk_rows", [None, 1000, 131])
def test_many_rows_of_float32(impl: str, device: str, chunk_rows: int | None) -> None:
    """Large products take other paths on the CPU: they are padded, and the weight's gradient is made transposed."""
    case = linear_case(16, 203, 37, 129, device)  # some 1600 scored
    narrow = as_dtype(case, torch.float32)
    loss = narrow.loss(reduction="sum", chunk_rows=chunk_rows, impl=impl)
    each = case.loss_weight * dense_nll(case.logits(), case.x0, case.masked, True)
    torch.testing.assert_close(loss.double(), each.sum(), rtol=1e-6, atol=0)
    upstream = torch.ones((), device=device)
    wanted = case.gradients(each.sum(), upstream.double())
    for got, want in zip(narrow.gradients(loss, upstream), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_gradcheck(impl: str, device: str) -> None:
    case = linear_case(2, 4, 3, 5, device)

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        at = case._replace(hidden=hidden, weight=weight, bias=bias)
        options: dict[str, Any] = {"label_smoothing": 0.2, "softcap": 4.0, "chunk_rows": 2, "impl": impl}
        return at.loss(**options), at.loss(reduction="none", shift=False, **options)

    assert torch.autograd.gradcheck(losses, case.leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_noncontiguous(impl: str, device: str, reduction: str) -> None:
    case = linear_case(3, 8, 5, 11, device)
    awkward = Case(*(strided(x) for x in case))
    values = []
    for each in (case, awkward):
        loss = each.loss(reduction=reduction, impl=impl)
        upstream = torch.arange(24.0, dtype=torch.float64, device=device).reshape(8, 3).T if loss.dim() else None
        values.append([loss, *each.gradients(loss, upstream)])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch", "zero tensor"])
def test_nothing_masked(impl: str, device: str, normalizer: str, reduction: str) -> None:
    case = linear_case(2, 6, 3, 5, device, torch.float32)
    case.masked[:] = False
    case.masked[:, 0] = True  # no row predicts it
    below = torch.zeros((), device=device) if normalizer == "zero tensor" else normalizer
    loss = case.loss(normalizer=below, reduction=reduction, impl=impl)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in case.gradients(loss.sum()))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_unscored_positions_never_contribute(impl: str, device: str, reduction: str) -> None:
    """Only rows that predict a masked token are computed: what is elsewhere matters not even when it is NaN."""
    case = linear_case(2, 10, 4, 6, device)
    scored = case.masked.clone()
    scored[:, 0] = False
    loss = case.loss(reduction=reduction, impl=impl).sum()
    predicts = scored.roll(-1, dims=1)  # row i predicts i + 1
    dirty = case._replace(
        hidden=case.hidden.detach().masked_fill(~predicts[..., None], torch.nan).requires_grad_(),
        x0=case.x0.masked_fill(~scored, -100),
        loss_weight=case.loss_weight.masked_fill(~scored, torch.inf),
    )
    got = dirty.loss(reduction=reduction, impl=impl).sum()
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(dirty.gradients(got), case.gradients(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_extreme_values(impl: str, device: str) -> None:
    """Logits of 1e6 and everything masked: finite, and as from the logits themselves."""
    case = linear_case(2, 6, 3, 5, device, torch.float32)
    case.masked[:] = True
    huge = case._replace(hidden=(case.hidden.detach() * 1e6).requires_grad_())
    loss = huge.loss(impl=impl)
    expected, _ = shifted_cross_entropy(
        huge.logits(), huge.x0, huge.masked, loss_weight=huge.loss_weight, impl="reference"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(huge.gradients(loss), huge.gradients(expected), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(impl: str, device: str, reduction: str) -> None:
    """Cast to autocast's dtype, float32 losses, gradients in the leaves' dtype."""
    case = linear_case(2, 12, 16, 40, device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = case.loss(reduction=reduction, impl=impl)
    low = as_dtype(case, torch.bfloat16)
    expected = low.loss(reduction=reduction, impl=impl)
    assert loss.dtype == torch.float32
    assert_all_equal([loss], [expected])
    gradients = case.gradients(loss.sum())
    assert {g.dtype for g in gradients} == {torch.float32}
    assert_all_equal([g.bfloat16() for g in gradients], low.gradients(expected.sum()))


@pytest.mark.parametrize("bad_id", [-1, 6, -100, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ids_out_of_range(impl: str, device: str, reads_values: bool, reduction: str, bad_id: int) -> None:
    case = linear_case(2, 5, 3, 6, device)
    case.masked[1, 2], case.x0[1, 2] = True, bad_id
    if reads_values:
        with pytest.raises(IndexError, match=rf"x0 .*\b{abs(bad_id)}\b.*outside.*\[0, 6\)"):
            case.loss(reduction=reduction, impl=impl)
    else:
        assert case.loss(reduction=reduction, impl=impl).isnan().any()


F32, F64, I64 = torch.float32, torch.float64, torch.int64


@bad_inputs(
    ("hidden", zeros(F32, 4, 3), ValueError, r"^hidden must be .*\[B, L, H\], got float32\[4, 3\]"),
    ("hidden", zeros(I64, 2, 4, 3), TypeError, r"^hidden must be float32/.*, got int64"),
    ("lm_head_weight", zeros(F32, 3, 6), ValueError, r"^lm_head_weight must be float32\[V, 3\], got float32\[3, 6\]"),
    ("lm_head_weight", zeros(F64, 6, 3), TypeError, r"^lm_head_weight must be float32\[V, 3\], got float64"),
    ("lm_head_weight", elsewhere(F32, 6, 3), ValueError, r"^lm_head_weight must be on .*, got .* on meta"),
    ("bias", zeros(F32, 5), ValueError, r"^bias must be float32\[6\], got float32\[5\]"),
    ("bias", zeros(F64, 6), TypeError, r"^bias must be float32\[6\], got float64"),
    ("bias", elsewhere(F32, 6), ValueError, r"^bias must be on"),
    ("x0", zeros(I64, 2, 5), ValueError, r"^x0 must be int64\[2, 4\], got int64\[2, 5\]"),
    ("masked", zeros(torch.bool, 2, 5), ValueError, r"^masked must be bool\[2, 4\], got bool\[2, 5\]"),
    ("masked", zeros(F32, 2, 4), TypeError, r"^masked must be bool\[2, 4\], got float32"),
    ("loss_weight", zeros(F32, 3), ValueError, r"^loss_weight must be .*\[2\], got float32\[3\]"),
    ("maskable", zeros(torch.bool, 3, 4), ValueError, r"^maskable must be bool\[2, 4\], got bool\[3, 4\]"),
    ("normalizer", lambda d: "mean", ValueError, r"^normalizer must be one of 'tokens'.*, got 'mean'"),
    ("reduction", lambda d: "avg", ValueError, r"^reduction must be one of 'mean'.*, got 'avg'"),
    ("label_smoothing", lambda d: -0.1, ValueError, r"^label_smoothing must be in \[0, 1\], got -0.1"),
    ("softcap", lambda d: 0, ValueError, r"^softcap must be in \(0, inf\], got 0"),
    ("accum_dtype", lambda d: torch.bfloat16, ValueError, r"^accum_dtype must be torch.float32 or .*bfloat16"),
    ("chunk_rows", lambda d: 0, ValueError, r"^chunk_rows must be in \[1, .*\], got 0"),
    ("chunk_rows", lambda d: 2.5, TypeError, r"^chunk_rows must be an int, got 2.5"),
    ("max_scored", lambda d: -1, ValueError, r"^max_scored must be in \[0, .*\], got -1"),
    ("impl", lambda d: "liger", ValueError, r"^impl must be 'auto', 'ext' or 'reference', got 'liger'"),
)
def test_rejects_bad_input(impl: str, device: str, bad: BadInput) -> None:
    case = linear_case(2, 4, 3, 6, device, F32)
    arguments = {
        "hidden": case.hidden,
        "lm_head_weight": case.weight,
        "bias": case.bias,
        "x0": case.x0,
        "masked": case.masked,
        "maskable": torch.ones_like(case.masked),
        "impl": impl,
    }
    bad.check(linear_shifted_cross_entropy, arguments, device)


@pytest.mark.ext
@pytest.mark.parametrize("max_scored", [-1, 10], ids=["unknown", "bounded"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck(device: str, bias: bool, max_scored: int) -> None:
    case = linear_case(2, 5, 4, 7, device, F32)
    ops = torch.ops.diffullama
    head = (case.hidden, case.weight, case.bias if bias else None)
    options: tuple[Any, ...] = (True, 0.1, 2.0, 3, torch.float32, max_scored)
    needs = (True, True, bias)
    torch.library.opcheck(ops.linear_shifted_nll.default, (*head, case.x0, case.masked, *options))
    weight = case.loss_weight.float()
    torch.library.opcheck(
        ops.linear_shifted_cross_entropy.default, (*head, case.x0, case.masked, weight, *options, *needs)
    )
    detached = [None if x is None else x.detach() for x in head]
    arguments = (weight, *detached, case.x0, case.masked, *options, *needs)
    torch.library.opcheck(ops.linear_shifted_nll_backward.default, arguments)


@pytest.mark.ext
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(device: str, reduction: str) -> None:
    case = linear_case(2, 9, 8, 20, device, F32)

    def step(hidden: Tensor, weight: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        loss, _ = linear_shifted_cross_entropy(
            hidden, weight, case.x0, masked, loss_weight=1 / t, reduction=reduction, impl="ext"
        )
        return loss.sum()

    def check(got: Tensor, eager: Tensor) -> None:
        torch.testing.assert_close(got, eager)
        leaves = case.leaves[:2]
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(a, b)

    draws = [(torch.rand(2, 9, device=device) < r, torch.full((2,), r, device=device)) for r in (0.2, 0.5, 0.9)]
    assert compiled_frames(step, [(*case.leaves[:2], *draw) for draw in draws], check) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_deterministic(impl: str, device: str, reduction: str) -> None:
    case = linear_case(2, 50, 32, 1000, device, F32)
    runs = []
    for _ in range(2):
        loss = case.loss(reduction=reduction, impl=impl)
        runs.append([loss, *case.gradients(loss.sum())])
    assert_all_equal(*runs)
