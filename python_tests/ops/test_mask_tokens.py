# SPDX-License-Identifier: Apache-2.0
"""mask_tokens: the draw bit for bit, what it depends on, and what it must not depend on."""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from comparison import BadInput, assert_all_equal, bad_inputs, compiled_frames, elsewhere, strided, zeros
from hypothesis import given
from hypothesis import strategies as st
from oracles import TAG_NOISE, threshold, words_by_position
from torch import Tensor

import diffullama_ext
from diffullama_ext import MaskedTokens, mask_tokens

pytestmark = pytest.mark.op("mask_tokens")

MASK_ID = 7
SHAPES = [(1, 1), (2, 63), (3, 1000), (5, 6), (4, 0), (0, 9)]
SEEDS = [0, 1, -1, 2**63 + 12345, -(2**63)]


def _inputs(batch: int, length: int, device: str, *, by_token: bool = False) -> dict[str, Any]:
    shape = (batch, length) if by_token else (batch,)
    return {
        "x0": torch.randint(0, 50, (batch, length)).to(device),
        "p_mask": (0.05 + 0.9 * torch.rand(shape)).to(device),
        "maskable": (torch.rand(batch, length) < 0.8).to(device),
        "sample_index": torch.randint(-(2**62), 2**62, (batch,)).to(device),
    }


def _oracle(x0: Tensor, p_mask: Tensor, maskable: Tensor, sample_index: Tensor, seed: int) -> MaskedTokens:
    batch, length = x0.shape
    p = p_mask.cpu().numpy()
    words = words_by_position(sample_index.tolist(), length, seed, TAG_NOISE, high=None)
    masked = torch.from_numpy(words < threshold(p if p.ndim == 2 else p[:, None])) & maskable.cpu()
    xt, positions, counts = x0.cpu().clone(), [], [0] * batch
    for b, j in masked.nonzero().tolist():
        xt[b, j] = MASK_ID
        positions.append(b * length + j)
        counts[b] += 1
    positions += [-1] * (batch * length - len(positions))
    values = (xt, masked, torch.tensor(positions, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64))
    return MaskedTokens(*(value.to(x0.device) for value in values))


@pytest.mark.parametrize("by_token", [False, True], ids=["p[B]", "p[B,L]"])
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_matches_oracle(impl: str, device: str, batch: int, length: int, by_token: bool) -> None:
    inputs = _inputs(batch, length, device, by_token=by_token)
    for seed in SEEDS:
        got = mask_tokens(**inputs, mask_id=MASK_ID, seed=seed, impl=impl)
        assert_all_equal(got, _oracle(**inputs, seed=seed))


@pytest.mark.ext
@pytest.mark.parametrize(("batch", "length"), [*SHAPES, (64, 2048)])
def test_matches_reference(device: str, batch: int, length: int) -> None:
    inputs = _inputs(batch, length, device)
    expected = mask_tokens(**inputs, mask_id=MASK_ID, seed=3, impl="reference")
    assert_all_equal(mask_tokens(**inputs, mask_id=MASK_ID, seed=3, impl="ext"), expected)


def test_noncontiguous(impl: str, device: str) -> None:
    inputs = _inputs(3, 41, device, by_token=True)
    awkward: dict[str, Any] = {name: strided(x) for name, x in inputs.items()}
    got = mask_tokens(**awkward, mask_id=MASK_ID, seed=9, impl=impl)
    assert_all_equal(got, mask_tokens(**inputs, mask_id=MASK_ID, seed=9, impl=impl))
    got = mask_tokens(inputs["x0"], torch.tensor([0.5], device=device).expand(3), mask_id=1, seed=9, impl=impl)
    assert_all_equal(got, mask_tokens(inputs["x0"], torch.full((3,), 0.5, device=device), mask_id=1, seed=9, impl=impl))


def test_extreme_values(impl: str, device: str) -> None:
    x0 = torch.full((2, 5000), 2**62, device=device)
    p_mask = torch.tensor([0.0, 1.0], device=device)
    got = mask_tokens(x0, p_mask, mask_id=2**63 - 1, seed=0, impl=impl)
    assert got.counts.tolist() == [0, 5000], "p = 0 masks nothing and p = 1 everything"
    assert (got.xt[0] == 2**62).all()
    assert (got.xt[1] == 2**63 - 1).all()
    nothing = mask_tokens(x0, p_mask, mask_id=0, maskable=torch.zeros_like(x0, dtype=torch.bool), seed=0, impl=impl)
    assert nothing.counts.tolist() == [0, 0]
    assert (nothing.positions == -1).all()
    below_one = torch.full((2,), 1.0 - 2.0**-24, device=device)  # the largest float32 below 1
    assert mask_tokens(x0, below_one, mask_id=0, seed=0, impl=impl).counts.min() >= 4999


def test_threshold_is_exclusive_to_the_last_bit(impl: str, device: str) -> None:
    """A token whose word is w stays at p = w / 2**32 and is masked at the next float32 above."""
    words = words_by_position([0], 40_000, 13, TAG_NOISE, high=None)[0]
    # Words that are float32 multiples of 2**-32, and large enough that the next float32 is a unit above.
    exact = np.flatnonzero((threshold(words / 2.0**32) == words) & (words >= 2**24))
    assert len(exact) > 200
    p = torch.from_numpy((words[exact] / 2.0**32).astype(np.float32))
    p_mask = torch.zeros(1, len(words))
    for value, expected in ((p, False), (torch.nextafter(p, torch.tensor(1.0)), True)):
        p_mask[0, exact] = value
        x0 = torch.zeros(1, len(words), dtype=torch.int64, device=device)
        got = mask_tokens(x0, p_mask.to(device), mask_id=1, seed=13, impl=impl)
        assert got.masked[0].cpu()[exact].tolist() == [expected] * len(exact)


def test_masked_is_the_draw_and_not_the_id(impl: str, device: str) -> None:
    x0 = torch.full((4, 200), MASK_ID, device=device)  # every real token has the mask's id
    got = mask_tokens(x0, torch.full((4,), 0.25, device=device), mask_id=MASK_ID, seed=5, impl=impl)
    assert torch.equal(got.counts, got.masked.sum(dim=1))
    assert 100 < int(got.counts.sum()) < 300


@pytest.mark.parametrize("maskable", [True, False], ids=["maskable", "all"])
def test_unmasked_tokens_and_inputs_stay(impl: str, device: str, maskable: bool) -> None:
    inputs = _inputs(3, 100, device)
    if not maskable:
        del inputs["maskable"]
    before = {name: x.clone() for name, x in inputs.items()}
    got = mask_tokens(**inputs, mask_id=MASK_ID, seed=2, impl=impl)
    assert torch.equal(got.xt[~got.masked], inputs["x0"][~got.masked])
    assert not (maskable and (got.masked & ~inputs["maskable"]).any())
    assert_all_equal(inputs.values(), before.values())


@pytest.mark.parametrize("high_bits", [0, 1, 2**30], ids=["32-bit", "33-bit", "62-bit"])
def test_default_sample_index_counts_from_zero(impl: str, device: str, high_bits: int) -> None:
    x0, p_mask = torch.zeros(4, 50, dtype=torch.int64, device=device), torch.full((4,), 0.5, device=device)
    default = mask_tokens(x0, p_mask, mask_id=1, seed=11, impl=impl)
    index = torch.arange(4, device=device) + high_bits * 2**32
    given_index = mask_tokens(x0, p_mask, mask_id=1, seed=11, sample_index=index, impl=impl)
    assert torch.equal(default.masked, given_index.masked) == (high_bits == 0)


@given(
    length=st.integers(1, 40),
    indices=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8, unique=True),
    order=st.randoms(use_true_random=False),
    cut=st.integers(0, 8),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_sample_is_independent_of_its_batch(
    impl: str, device: str, length: int, indices: list[int], order: Random, cut: int, seed: int
) -> None:
    """Whatever batch, position or micro-batch a sample is drawn in, its noise is that of the sample drawn alone."""

    def draw(samples: list[int]) -> list[list[bool]]:
        x0 = torch.zeros(len(samples), length, dtype=torch.int64, device=device)
        p_mask = torch.full((len(samples),), 0.5, device=device)
        index = torch.tensor(samples, dtype=torch.int64, device=device)
        return mask_tokens(x0, p_mask, mask_id=1, seed=seed, sample_index=index, impl=impl).masked.tolist()

    alone = {sample: draw([sample])[0] for sample in indices}
    shuffled = list(indices)
    order.shuffle(shuffled)
    assert draw(shuffled) == [alone[sample] for sample in shuffled]
    assert draw(shuffled[:cut]) + draw(shuffled[cut:]) == [alone[sample] for sample in shuffled]


def test_position_is_independent_of_length(impl: str, device: str) -> None:
    p_mask = torch.full((2,), 0.5, device=device)
    long, short = (
        mask_tokens(torch.zeros(2, n, dtype=torch.int64, device=device), p_mask, mask_id=1, seed=4, impl=impl).masked
        for n in (129, 62)
    )
    assert torch.equal(long[:, :62], short)


def test_seed_comes_from_the_generator(impl: str, device: str) -> None:
    x0, p_mask = torch.zeros(2, 64, dtype=torch.int64, device=device), torch.full((2,), 0.5, device=device)

    def draw(generator: torch.Generator | None) -> Tensor:
        return mask_tokens(x0, p_mask, mask_id=1, generator=generator, impl=impl).masked

    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    first, second = draw(generator), draw(generator)
    assert torch.equal(torch.get_rng_state(), state), "a given generator is the only source"
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(torch.Generator().manual_seed(5)))
    assert not torch.equal(draw(None), draw(None)), "torch's default generator advances"


def test_int_and_tensor_seeds_agree(impl: str, device: str) -> None:
    inputs = _inputs(2, 33, device)
    pairs = [(7, 7), (-1, 2**64 - 1), (-(2**63), 2**63)]
    for as_tensor, as_int in pairs:
        by_tensor = mask_tokens(**inputs, mask_id=0, seed=torch.tensor([as_tensor], device=device), impl=impl)
        assert_all_equal(by_tensor, mask_tokens(**inputs, mask_id=0, seed=as_int, impl=impl))


@bad_inputs(
    ("x0", lambda d: [[1]], TypeError, r"^x0 must be a tensor int64\[B, L\], got list"),
    ("x0", zeros(torch.float32, 2, 5), TypeError, r"^x0 must be int64\[B, L\], got float32\[2, 5\]"),
    ("x0", zeros(torch.int64, 5), ValueError, r"^x0 must be int64\[B, L\], got int64\[5\]"),
    ("p_mask", lambda d: 0.5, TypeError, r"^p_mask must be a tensor float32\[2\], got float"),
    ("p_mask", zeros(torch.float32, 3), ValueError, r"^p_mask must be float32\[2\], got float32\[3\]"),
    ("p_mask", zeros(torch.float32, 2, 4), ValueError, r"^p_mask must be float32\[2, 5\], got .*\[2, 4\]"),
    ("p_mask", zeros(torch.float64, 2), TypeError, r"^p_mask must be float32\[2\], got float64"),
    ("p_mask", elsewhere(torch.float32, 2), ValueError, r"^p_mask must be on .*, got .* on meta"),
    ("maskable", zeros(torch.bool, 2, 4), ValueError, r"^maskable must be bool\[2, 5\], got bool\[2, 4\]"),
    ("maskable", zeros(torch.int64, 2, 5), TypeError, r"^maskable must be bool\[2, 5\], got int64\[2, 5\]"),
    ("maskable", elsewhere(torch.bool, 2, 5), ValueError, r"^maskable must be on"),
    ("mask_id", lambda d: -1, ValueError, r"^mask_id must be in \[0, .*\], got -1"),
    ("mask_id", lambda d: 1.5, TypeError, r"^mask_id must be an int, got 1.5"),
    ("seed", lambda d: 1.5, TypeError, r"^seed must be an int, got 1.5"),
    ("seed", lambda d: 2**64, ValueError, r"^seed must fit 64 bits, got 18446744073709551616"),
    ("seed", lambda d: -(2**63) - 1, ValueError, r"^seed must fit 64 bits"),
    ("seed", zeros(torch.int64, 2), ValueError, r"^seed must have one element, got int64\[2\]"),
    ("seed", zeros(torch.float32, 1), TypeError, r"^seed must be int64, got float32\[1\]"),
    ("sample_index", zeros(torch.int64, 3), ValueError, r"^sample_index must be int64\[2\], got int64\[3\]"),
    ("sample_index", elsewhere(torch.int64, 2), ValueError, r"^sample_index must be on"),
    ("impl", lambda d: "cuda", ValueError, r"^impl must be 'auto', 'ext' or 'reference', got 'cuda'"),
)
def test_rejects_bad_input(impl: str, device: str, bad: BadInput) -> None:
    arguments = _inputs(2, 5, device) | {"mask_id": 3, "seed": 1, "impl": impl}
    bad.check(mask_tokens, arguments, device)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_mask_out_of_range(impl: str, device: str, reads_values: bool, p: float) -> None:
    x0, p_mask = torch.zeros(2, 5, dtype=torch.int64, device=device), torch.tensor([0.5, p], device=device)
    if reads_values:
        with pytest.raises(ValueError, match=rf"^p_mask must be in \[0, 1\], got {p:g}"):
            mask_tokens(x0, p_mask, mask_id=1, seed=0, impl=impl)
    else:  # clamped, without a synchronisation
        assert int(mask_tokens(x0, p_mask, mask_id=1, seed=0, impl=impl).counts[1]) == (5 if p > 1 else 0)


@pytest.mark.ext
@pytest.mark.parametrize("maskable", [True, False], ids=["maskable", "all"])
def test_opcheck(device: str, maskable: bool) -> None:
    inputs = _inputs(2, 13, device)
    seed = torch.tensor([3], device=device)
    allowed = inputs["maskable"] if maskable else None
    arguments = (inputs["x0"], inputs["p_mask"], allowed, seed, inputs["sample_index"], MASK_ID)
    torch.library.opcheck(torch.ops.diffullama.mask_tokens.default, arguments)


@pytest.mark.ext
def test_compile_fullgraph(device: str) -> None:
    def step(x0: Tensor, p_mask: Tensor, seed: Tensor, sample_index: Tensor) -> MaskedTokens:
        return mask_tokens(x0, p_mask, mask_id=MASK_ID, seed=seed, sample_index=sample_index, impl="ext")

    calls = []
    for seed in range(5):
        inputs = _inputs(2, 65, device)
        calls.append((inputs["x0"], inputs["p_mask"], torch.tensor([seed], device=device), inputs["sample_index"]))
    assert compiled_frames(step, calls, assert_all_equal) == 1


def test_deterministic(impl: str, device: str) -> None:
    inputs = _inputs(4, 3000, device)
    first, second = (mask_tokens(**inputs, mask_id=MASK_ID, seed=1, impl=impl) for _ in range(2))
    assert_all_equal(first, second)


def test_measured_rates(impl: str, device: str) -> None:
    """Within 4 sigma of p."""
    ratios = torch.tensor([1e-4, 0.01, 0.5, 0.99], device=device)
    n = 800_000
    masked = mask_tokens(torch.zeros(4, n, dtype=torch.int64, device=device), ratios, mask_id=1, seed=17, impl=impl)
    for p, count in zip(ratios.double().tolist(), masked.counts.tolist(), strict=True):
        assert abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


def test_no_visible_correlation(impl: str, device: str) -> None:
    """Positions, samples and consecutive seeds: the largest of all pairwise correlations is noise-sized."""
    shape = (128, 1024)
    x0, p_mask = torch.zeros(shape, dtype=torch.int64, device=device), torch.full((128,), 0.5, device=device)
    draws = [mask_tokens(x0, p_mask, mask_id=1, seed=seed, impl=impl).masked for seed in range(3)]
    signs = [draw.double() * 2 - 1 for draw in draws]
    by_sample = torch.cat(signs[:2])  # rows: 128 samples of each of 2 seeds
    for rows in (by_sample, torch.cat(signs, dim=0).T):  # then 1024 positions over 384 draws
        z = (rows @ rows.T / rows.shape[1] ** 0.5).fill_diagonal_(0.0)
        assert z.abs().max() < 5.6  # the largest of half a million standard normals is about 5
    assert abs(float((signs[0] * signs[1]).sum())) < 4 * x0.numel() ** 0.5


def test_default_impl_runs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFULLAMA_IMPL", "reference")
    inputs = _inputs(2, 9, device)
    expected = mask_tokens(**inputs, mask_id=1, seed=1, impl="reference")
    assert_all_equal(diffullama_ext.mask_tokens(**inputs, mask_id=1, seed=1), expected)
