# SPDX-License-Identifier: Apache-2.0
"""shifted_cross_entropy, from logits: values, gradients, normalisers, and what never contributes."""

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
from oracles import denominator, dense_nll
from torch import Tensor

from diffullama_ext import shifted_cross_entropy

pytestmark = pytest.mark.op("shifted_cross_entropy")

SHAPES = [(1, 1, 1), (2, 7, 5), (3, 33, 130), (1, 64, 1001), (4, 0, 3), (0, 5, 3)]
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "both": {"label_smoothing": 0.3, "softcap": 2.0},
}


def _inputs(
    batch: int, length: int, vocab: int, device: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, x0, masked, loss_weight [B, L]."""
    logits = (3 * torch.randn(batch, length, vocab, dtype=torch.float64)).to(device, dtype).requires_grad_()
    x0 = torch.randint(0, vocab, (batch, length))
    masked = torch.rand(batch, length) < 0.5
    weight = 0.5 + torch.rand(batch, length, dtype=torch.float64)
    return logits, x0.to(device), masked.to(device), weight.to(device)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(impl: str, device: str, shape: tuple[int, int, int], shift: bool, option: str) -> None:
    """reduction="none" under a non-uniform upstream gradient."""
    logits, x0, masked, weight = _inputs(*shape, device)
    options: dict[str, Any] = OPTIONS[option]
    loss, stats = shifted_cross_entropy(
        logits, x0, masked, loss_weight=weight, shift=shift, reduction="none", impl=impl, **options
    )
    nll = dense_nll(logits, x0, masked, shift, **options)
    torch.testing.assert_close(loss, weight * nll, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(loss)
    (got,) = torch.autograd.grad(loss, logits, upstream)
    (expected,) = torch.autograd.grad(nll, logits, upstream * weight)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.weighted_sum, (weight * nll).sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.nll_sum, nll.detach().sum(), rtol=1e-10, atol=1e-12)
    assert int(stats.n_scored) == int(masked[:, int(shift) :].sum())
    assert stats.n_scored.dtype == torch.int64
    assert not stats.nll_sum.requires_grad


@pytest.mark.parametrize("maskable", [True, False], ids=["maskable", "all"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch"])
def test_normalizers(impl: str, device: str, normalizer: str, shift: bool, maskable: bool) -> None:
    logits, x0, masked, weight = _inputs(3, 9, 6, device)
    masked[2] = False  # a sequence with nothing scored
    able = (masked | (torch.rand(3, 9, device=device) < 0.5)) if maskable else None
    loss, _ = shifted_cross_entropy(
        logits, x0, masked, loss_weight=weight, maskable=able, shift=shift, normalizer=normalizer, impl=impl
    )
    below = torch.tensor(denominator(normalizer, masked, able, shift), dtype=torch.float64, device=device)
    expected = ((weight * dense_nll(logits, x0, masked, shift)).sum(dim=1) / below).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    (got,), (want,) = torch.autograd.grad(3 * loss, logits), torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalizer", [2.5, 7, "tensor"])
def test_number_normalizers_and_sum(impl: str, device: str, normalizer: Any) -> None:
    logits, x0, masked, weight = _inputs(2, 9, 6, device)
    below = torch.tensor(12.0, device=device) if normalizer == "tensor" else normalizer
    options: dict[str, Any] = {"loss_weight": weight, "impl": impl}
    total, stats = shifted_cross_entropy(logits, x0, masked, reduction="sum", **options)
    loss, _ = shifted_cross_entropy(logits, x0, masked, normalizer=below, **options)
    torch.testing.assert_close(loss, total / below)
    torch.testing.assert_close(total, stats.weighted_sum)


@pytest.mark.parametrize("shape", ["[B]", "[B,L]", "none"])
def test_loss_weights(impl: str, device: str, shape: str) -> None:
    logits, x0, masked, by_token = _inputs(3, 8, 5, device)
    by_sequence = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float32, device=device)
    weight = {"[B]": by_sequence, "[B,L]": by_token, "none": None}[shape]
    loss, _ = shifted_cross_entropy(logits, x0, masked, loss_weight=weight, reduction="sum", impl=impl)
    wide: Any = {"[B]": by_sequence[:, None].double(), "[B,L]": by_token, "none": 1.0}[shape]
    torch.testing.assert_close(loss, (wide * dense_nll(logits, x0, masked, True)).sum(), rtol=1e-9, atol=1e-9)


def test_released_diffullama_formula(impl: str, device: str) -> None:
    """normalizer="masked" and weight 1/t: sum over masked of CE/t, over the number masked, after the shift."""
    logits, x0, masked, _ = _inputs(3, 12, 9, device, torch.float32)
    t = torch.tensor([0.2, 0.5, 0.9], device=device)
    loss, stats = shifted_cross_entropy(logits, x0, masked, loss_weight=1 / t, normalizer="masked", impl=impl)
    scored = masked[:, 1:]
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), x0[:, 1:], reduction="none")
    expected = (ce.masked_fill(~scored, 0) / t[:, None]).sum() / scored.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert int(stats.n_scored) == int(scored.sum())


def test_everything_masked_with_weight_one_is_torch_cross_entropy(impl: str, device: str) -> None:
    logits, x0, _, _ = _inputs(2, 10, 7, device)
    everything = torch.ones_like(x0, dtype=torch.bool)
    loss, _ = shifted_cross_entropy(logits, x0, everything, shift=False, impl=impl)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), x0.flatten()))


@pytest.mark.ext
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_reference(device: str, dtype: torch.dtype, option: str) -> None:
    logits, x0, masked, weight = _inputs(2, 40, 503, device, dtype)
    options: dict[str, Any] = OPTIONS[option]
    values = []
    for impl in ("ext", "reference"):
        loss, stats = shifted_cross_entropy(logits, x0, masked, loss_weight=weight.float(), impl=impl, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        values.append([loss, *stats, gradient])
    for ours, expected in zip(*values, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [100, 4099])
def test_no_worse_than_torch(impl: str, device: str, dtype: torch.dtype, vocab: int) -> None:
    logits, x0, masked, _ = _inputs(2, 20, vocab, device, dtype)
    exact = logits.detach().double().requires_grad_()
    upstream = torch.randn(2, 20, device=device)
    loss, _ = shifted_cross_entropy(logits, x0, masked, reduction="none", impl=impl)
    assert loss.dtype == torch.float32
    truth, low = dense_nll(exact, x0, masked, True), dense_nll(logits, x0, masked, True)
    assert_no_worse_than_torch(loss.detach(), truth.detach(), low.detach())
    gradients = [
        torch.autograd.grad(value, inputs, upstream.to(value.dtype))[0]
        for value, inputs in ((loss, logits), (truth, exact), (low, logits))
    ]
    assert gradients[0].dtype == dtype
    assert_no_worse_than_torch(*gradients)


def test_gradcheck(impl: str, device: str) -> None:
    logits, x0, masked, weight = _inputs(2, 5, 4, device)

    def losses(logits: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"loss_weight": weight, "label_smoothing": 0.2, "softcap": 4.0, "impl": impl}
        mean, _ = shifted_cross_entropy(logits, x0, masked, **options)
        each, _ = shifted_cross_entropy(logits, x0, masked, shift=False, reduction="none", **options)
        return mean, each

    assert torch.autograd.gradcheck(losses, (logits,))


def test_noncontiguous(impl: str, device: str) -> None:
    logits, x0, masked, weight = _inputs(3, 8, 11, device)
    awkward = strided(logits)
    values = []
    for inputs in ((logits, x0, masked, weight), tuple(strided(x) for x in (awkward, x0, masked, weight))):
        loss, _ = shifted_cross_entropy(*inputs[:3], loss_weight=inputs[3], reduction="none", impl=impl)
        upstream = torch.arange(24.0, dtype=torch.float64, device=device).reshape(8, 3).T
        values.append([loss, *torch.autograd.grad(loss, inputs[0], upstream)])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch", "zero tensor"])
def test_nothing_masked(impl: str, device: str, normalizer: Any, reduction: str) -> None:
    """Nothing scored is 0 with zero gradients; also where only position 0 is masked, which no row predicts."""
    logits, x0, masked, _ = _inputs(2, 6, 5, device, torch.float32)
    masked[:] = False
    masked[:, 0] = True
    below = torch.zeros((), device=device) if normalizer == "zero tensor" else normalizer
    loss, stats = shifted_cross_entropy(logits, x0, masked, normalizer=below, reduction=reduction, impl=impl)
    assert (loss == 0).all()
    assert [float(x.detach()) for x in stats] == [0.0, 0.0, 0.0]
    assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


def test_unscored_positions_never_contribute(impl: str, device: str) -> None:
    """Ignore ids, ids outside the vocabulary, infinite weights and NaN logits matter nowhere but where scored."""
    logits, x0, masked, weight = _inputs(2, 10, 6, device)
    masked[:, 3:5] = False
    clean, _ = shifted_cross_entropy(logits, x0, masked, loss_weight=weight, reduction="sum", impl=impl)
    (clean_gradient,) = torch.autograd.grad(clean, logits)
    scored = masked.clone()
    scored[:, 0] = False
    dirty_x0 = x0.masked_fill(~scored, -100)
    dirty_x0[:, 3] = 2**40
    dirty_weight = weight.masked_fill(~scored, torch.inf)
    predicts = scored.roll(-1, dims=1)  # row i predicts i + 1
    dirty = logits.detach().masked_fill(~predicts[..., None], torch.nan).requires_grad_()
    loss, _ = shifted_cross_entropy(dirty, dirty_x0, masked, loss_weight=dirty_weight, reduction="sum", impl=impl)
    assert_all_equal([loss], [clean])
    assert_all_equal(torch.autograd.grad(loss, dirty), [clean_gradient])


def test_protected_token_with_the_mask_id_is_not_scored(impl: str, device: str) -> None:
    """Scored is what was drawn: a real token whose id is the mask id adds nothing."""
    logits, x0, masked, _ = _inputs(2, 10, 6, device)
    mask_id = 5
    changed = x0.masked_fill(~masked, mask_id)
    results = [shifted_cross_entropy(logits, ids, masked, maskable=masked, impl=impl)[0] for ids in (x0, changed)]
    assert_all_equal(results[:1], results[1:])


@pytest.mark.parametrize("bad_id", [-1, 6, -100, 2**40])
def test_ids_out_of_range(impl: str, device: str, reads_values: bool, bad_id: int) -> None:
    logits, x0, masked, _ = _inputs(2, 5, 6, device)
    masked[1, 2], x0[1, 2] = True, bad_id
    if reads_values:
        with pytest.raises(IndexError, match=rf"x0 .*\b{abs(bad_id)}\b.*outside.*\[0, 6\)"):
            shifted_cross_entropy(logits, x0, masked, impl=impl)
    else:
        loss, _ = shifted_cross_entropy(logits, x0, masked, reduction="none", impl=impl)
        assert loss.isnan().nonzero().tolist() == [[1, 2]]


def test_extreme_values(impl: str, device: str) -> None:
    """Huge and -inf logits, as torch has them."""
    x0 = torch.tensor([[0, 1, 2, 3, 0]], device=device)
    rows = [[1e30, 0, 0, -1e30], [0, -1e30, 3e38, 0], [-torch.inf, -torch.inf, 1, 2], [0, 0, 0, -torch.inf], [0] * 4]
    logits = torch.tensor([rows], device=device, dtype=torch.float32).requires_grad_()
    masked = torch.ones_like(x0, dtype=torch.bool)
    for shift in (True, False):
        loss, _ = shifted_cross_entropy(logits, x0, masked, shift=shift, reduction="none", impl=impl)
        expected = dense_nll(logits, x0, masked, shift)
        torch.testing.assert_close(loss, expected)
        upstream = expected.isfinite().float()
        gradients = (torch.autograd.grad(x, logits, upstream)[0] for x in (loss, expected))
        torch.testing.assert_close(*gradients, equal_nan=True)


F32, I64 = torch.float32, torch.int64


@bad_inputs(
    ("logits", zeros(F32, 4, 6), ValueError, r"^logits must be .*\[B, L, V\], got float32\[4, 6\]"),
    ("logits", zeros(I64, 2, 4, 6), TypeError, r"^logits must be float32/.*, got int64"),
    ("x0", zeros(I64, 2, 5), ValueError, r"^x0 must be int64\[2, 4\], got int64\[2, 5\]"),
    ("x0", zeros(torch.int32, 2, 4), TypeError, r"^x0 must be int64\[2, 4\], got int32"),
    ("x0", elsewhere(I64, 2, 4), ValueError, r"^x0 must be on .*, got .* on meta"),
    ("masked", zeros(I64, 2, 4), TypeError, r"^masked must be bool\[2, 4\], got int64"),
    ("masked", zeros(torch.bool, 8), ValueError, r"^masked must be bool\[2, 4\], got bool\[8\]"),
    ("masked", elsewhere(torch.bool, 2, 4), ValueError, r"^masked must be on"),
    ("loss_weight", zeros(F32, 3), ValueError, r"^loss_weight must be .*\[2\], got float32\[3\]"),
    ("loss_weight", zeros(F32, 2, 5), ValueError, r"^loss_weight must be .*\[2, 4\], got float32\[2, 5\]"),
    ("loss_weight", zeros(I64, 2), TypeError, r"^loss_weight must be float32/.*, got int64"),
    (
        "loss_weight",
        lambda d: torch.ones(2, device=d, requires_grad=True),
        ValueError,
        r"^loss_weight must not require",
    ),
    ("loss_weight", lambda d: 2.0, TypeError, r"^loss_weight must be a tensor .*, got float"),
    ("maskable", zeros(torch.bool, 2, 5), ValueError, r"^maskable must be bool\[2, 4\], got bool\[2, 5\]"),
    ("maskable", zeros(F32, 2, 4), TypeError, r"^maskable must be bool\[2, 4\], got float32"),
    ("normalizer", lambda d: "mean", ValueError, r"^normalizer must be one of 'tokens'.*, got 'mean'"),
    ("normalizer", lambda d: 0.0, ValueError, r"^normalizer must be in \(0, inf\], got 0.0"),
    ("normalizer", lambda d: -3, ValueError, r"^normalizer must be in \(0, inf\], got -3"),
    ("normalizer", zeros(F32, 2), ValueError, r"^normalizer must have one element, got \[2\]"),
    ("reduction", lambda d: "average", ValueError, r"^reduction must be one of 'mean'.*, got 'average'"),
    ("label_smoothing", lambda d: 1.5, ValueError, r"^label_smoothing must be in \[0, 1\], got 1.5"),
    ("softcap", lambda d: 0.0, ValueError, r"^softcap must be in \(0, inf\], got 0.0"),
    ("softcap", lambda d: -1.0, ValueError, r"^softcap must be in \(0, inf\], got -1.0"),
    ("impl", lambda d: "c", ValueError, r"^impl must be 'auto', 'ext' or 'reference', got 'c'"),
)
def test_rejects_bad_input(impl: str, device: str, bad: BadInput) -> None:
    logits, x0, masked, weight = _inputs(2, 4, 6, device, F32)
    arguments = {
        "logits": logits,
        "x0": x0,
        "masked": masked,
        "loss_weight": weight,
        "maskable": torch.ones_like(masked),
        "impl": impl,
    }
    bad.check(shifted_cross_entropy, arguments, device)


@pytest.mark.ext
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
def test_opcheck(device: str, shift: bool) -> None:
    logits, x0, masked, _ = _inputs(2, 5, 7, device, F32)
    ops = torch.ops.diffullama
    torch.library.opcheck(ops.shifted_cross_entropy.default, (logits, x0, masked, shift, 0.1, 2.0))
    nll, lse = ops.shifted_cross_entropy.default(logits.detach(), x0, masked, shift, 0.1, 2.0)
    arguments = (torch.randn_like(nll), logits.detach(), lse, x0, masked, shift, 0.1, 2.0)
    torch.library.opcheck(ops.shifted_cross_entropy_backward.default, arguments)


@pytest.mark.ext
@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence"])
def test_compile_fullgraph(device: str, normalizer: str) -> None:
    logits, x0, _, _ = _inputs(2, 9, 20, device, F32)

    def step(logits: Tensor, x0: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        return shifted_cross_entropy(logits, x0, masked, loss_weight=1 / t, normalizer=normalizer, impl="ext")[0]

    def check(got: Tensor, eager: Tensor) -> None:
        torch.testing.assert_close(got, eager)
        (a,), (b,) = torch.autograd.grad(got, logits), torch.autograd.grad(eager, logits)
        torch.testing.assert_close(a, b)

    calls = [(logits, x0, torch.rand(2, 9, device=device) < r, torch.full((2,), r, device=device)) for r in (0.2, 0.9)]
    assert compiled_frames(step, calls, check) == 1


def test_deterministic(impl: str, device: str) -> None:
    logits, x0, masked, weight = _inputs(2, 50, 1000, device, F32)
    runs = []
    for _ in range(2):
        loss, stats = shifted_cross_entropy(logits, x0, masked, loss_weight=weight, impl=impl)
        runs.append([loss, *stats, *torch.autograd.grad(loss, logits)])
    assert_all_equal(*runs)
