# SPDX-License-Identifier: Apache-2.0
"""token_stats: the statistics of a row, and the draw token by token. Its distribution: test_token_draws.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from comparison import BadInput, assert_all_equal, bad_inputs, compiled_frames, elsewhere, strided, zeros
from oracles import TAG_TOKEN, inverse_cdf, philox, truncated
from torch import Tensor

from diffullama_ext import TokenStats, token_stats

pytestmark = pytest.mark.op("token_stats")

SHAPES = [(1, 1), (3, 7), (5, 100), (2, 1001), (0, 9)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DRAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5, "forbid": 2},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.6},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "forbid": 0},
    "one": {"top_k": 1},
    "sliver": {"top_p": 1e-9},
}


def _logits(n_rows: int, vocab: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(n_rows, vocab, dtype=torch.float64)).to(device, dtype)


def _statistics(logits: Tensor, token: Tensor, current: Tensor | None, forbid: int | None) -> dict[str, list[float]]:
    """Every float of TokenStats but sample_prob, by numpy in float64."""
    columns: dict[str, list[float]] = {name: [] for name in TokenStats._fields[1:] if name != "sample_prob"}
    for n, row in enumerate(logits.double().cpu().numpy()):
        x = row.copy()
        if forbid is not None:
            x[forbid] = -np.inf
        lse = float(x.max() + np.log(np.exp(x - x.max()).sum()))
        p = np.exp(x - lse)
        two = [*sorted(x, reverse=True), -np.inf][:2]
        values = {
            "prob": p[token[n]],
            "p1": np.exp(two[0] - lse),
            "p2": np.exp(two[1] - lse),
            "gap": two[0] - two[1],
            "entropy": -sum(q * np.log(q) for q in p if q > 0),
            "logsumexp": lse,
            "current_prob": np.nan if current is None else p[current[n]],
        }
        for name, value in values.items():
            columns[name].append(float(value))
    return columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_match_oracle(impl: str, device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n_rows, vocab = shape
    logits = _logits(n_rows, vocab, device, dtype)
    current = torch.randint(0, vocab, (n_rows,), device=device)
    for forbid in (None, vocab // 2) if vocab > 1 else (None,):
        for ids in (current, None):
            options: dict[str, Any] = {"temperature": 0.5, "top_k": 2, "forbid": forbid}
            got = token_stats(logits, current=ids, seed=1, impl=impl, **options)
            expected = _statistics(logits, got.token, ids, forbid)
            for name, values in expected.items():
                column = getattr(got, name)
                assert column.dtype == torch.float32
                wanted = torch.tensor(values, dtype=torch.float64, device=device)
                torch.testing.assert_close(column.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("draw", DRAWS)
def test_draw_matches_oracle(impl: str, device: str, draw: str, ties: bool) -> None:
    """Token by token: the truncated distribution, inverted at the row's 62-bit uniform."""
    options = DRAWS[draw]
    logits = _logits(60, 300, device)
    logits = logits.round() if ties else logits
    index = torch.randint(-(2**63), 2**63 - 1, (60,), device=device)
    got = token_stats(logits, row_index=index, seed=99, step=2**32 + 7, impl=impl, **options)
    defaults = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "forbid": None}
    for n, row in enumerate(logits.tolist()):
        p = truncated(row, **(defaults | options))
        assert int(got.token[n]) == inverse_cdf(p, int(index[n]), 99, 2**32 + 7)
        assert float(got.sample_prob[n]) == pytest.approx(p[got.token[n]], rel=1e-5)


@pytest.mark.ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("draw", [*DRAWS, "greedy"])
def test_matches_reference(device: str, draw: str, dtype: torch.dtype) -> None:
    options = {"temperature": 0.0} if draw == "greedy" else DRAWS[draw]
    for shape in ((40, 503), (3, 50257)):
        logits = _logits(*shape, device, dtype)
        logits[0, ::3] = -torch.inf
        current = torch.randint(0, shape[1], shape[:1], device=device)
        current[:2] = torch.tensor([-1, shape[1]])  # no such id: NaN
        ours, expected = (token_stats(logits, current=current, seed=5, impl=i, **options) for i in ("ext", "reference"))
        assert torch.equal(ours.token, expected.token)
        for a, b in zip(ours[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_ties_go_to_the_lowest_id(impl: str, device: str) -> None:
    logits = torch.zeros(4000, 8, device=device)
    logits[:, 5:] = 1.0

    def drawn(**options: Any) -> set[int]:
        return set(token_stats(logits, seed=0, impl=impl, **options).token.tolist())

    assert drawn(temperature=0.0) == {5}
    assert drawn(top_k=2) == {5, 6}
    assert drawn(top_k=5) == {0, 1, 5, 6, 7}
    assert drawn(top_p=0.2) == {5}
    assert drawn(top_p=0.21) == {5, 6}, "each of the three has 0.2065"
    assert drawn(top_k=4, top_p=0.95) == {0, 5, 6, 7}
    assert drawn(top_k=4, top_p=0.85) == {5, 6, 7}, "top-p is of what top-k left: 3e / (3e + 1) = 0.89"
    assert drawn(temperature=0.0, forbid=5) == {6}
    logits[:] = 0.0
    assert drawn(top_p=0.25) == {0, 1}, "two of eight have exactly a quarter: the third would start at it"


@pytest.mark.parametrize("vocab", [2, 5000])
def test_draw_is_exact_to_the_last_unit_of_mass(impl: str, device: str, vocab: int, is_simulated: bool) -> None:
    """Of two tokens, first and last, the lighter is drawn from just that mass on, in 2**-44, that the row's u says.

    CUDA kernels take float64 logits as float32, whose exp has 2**-16 of the mass to spare.
    """
    words = philox(np.arange(64), 0, TAG_TOKEN, 0, 5).tolist()
    uniforms = {n: w[0] << 30 | w[1] >> 2 for n, w in enumerate(words) if w[0] < 2**31}
    assert len(uniforms) > 20
    for n, uniform in uniforms.items():
        least = uniform * 2**44 // (2**62 - uniform)  # near the least mass that exceeds its target
        while least > uniform * (least + 2**44) >> 62:
            least -= 1
        while least <= uniform * (least + 2**44) >> 62:
            least += 1
        spare = least >> 16 if is_simulated or (impl, device) == ("ext", "cuda") else 0
        for mass, expected in ((least - 1 - spare, 1), (least + spare, 0)):
            logits = torch.full((1, vocab), -torch.inf, dtype=torch.float64)
            logits[0, 0], logits[0, -1] = math.log(mass / 2**44), 0.0
            index = torch.tensor([n], device=device)
            got = token_stats(logits.to(device), row_index=index, seed=5, impl=impl)
            assert int(got.token) == expected * (vocab - 1)


def test_greedy_is_the_argmax(impl: str, device: str) -> None:
    logits = _logits(50, 77, device)
    got = token_stats(logits, temperature=0.0, top_k=5, top_p=0.3, seed=0, impl=impl)
    assert torch.equal(got.token, logits.argmax(dim=1))
    assert (got.sample_prob == 1).all()
    assert torch.equal(got.prob, got.p1)
    assert_all_equal(got, token_stats(logits, temperature=0.0, seed=1, step=9, impl=impl))


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300, 5e-324])
def test_tiny_temperature_is_greedy(impl: str, device: str, temperature: float) -> None:
    """Also where float32 has no such number."""
    logits = _logits(50, 77, device)
    got = token_stats(logits, temperature=temperature, top_p=0.9, seed=0, impl=impl)
    assert torch.equal(got.token, logits.argmax(dim=1))
    assert (got.sample_prob == 1).all()


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_huge_temperature_is_uniform(impl: str, device: str, temperature: float) -> None:
    """Over what may be drawn at all."""
    logits = _logits(1, 8, device).expand(4000, -1).clone()
    logits[:, 3] = -torch.inf
    got = token_stats(logits, temperature=temperature, forbid=5, seed=0, impl=impl)
    assert set(got.token.tolist()) == {0, 1, 2, 4, 6, 7}
    torch.testing.assert_close(got.sample_prob, torch.full_like(got.sample_prob, 1 / 6))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.5}], ids=str)
def test_invalid_rows(impl: str, device: str, options: dict[str, Any]) -> None:
    """NaN, +inf, or nothing allowed: token -1 and NaN everywhere; the other rows do not notice."""
    logits = _logits(7, 6, device)
    alone = token_stats(logits, forbid=3, current=torch.zeros(7, dtype=torch.int64, device=device), impl=impl, seed=1)
    logits[1, 2] = torch.nan
    logits[3, 5] = torch.inf
    logits[4, :] = -torch.inf
    logits[5, :] = -torch.inf
    logits[5, 3] = 1.0  # only the forbidden id
    got = token_stats(
        logits, forbid=3, current=torch.zeros(7, dtype=torch.int64, device=device), impl=impl, seed=1, **options
    )
    bad = torch.tensor([1, 3, 4, 5], device=device)
    assert (got.token[bad] == -1).all()
    for column in got[1:]:
        assert column[bad].isnan().all()
    good = [0, 2, 6]
    statistics = [name for name in TokenStats._fields[3:]]  # those that do not depend on the draw
    assert_all_equal([getattr(got, n)[good] for n in statistics], [getattr(alone, n)[good] for n in statistics])
    assert ((got.token[good] >= 0) & (got.token[good] != 3)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e4])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.7}], ids=str)
def test_forbidden_column_is_not_looked_at(impl: str, device: str, value: float, options: dict[str, Any]) -> None:
    logits = _logits(9, 40, device)
    expected = token_stats(logits, forbid=17, seed=3, impl=impl, **options)
    logits[:, 17] = value
    assert_all_equal(token_stats(logits, forbid=17, seed=3, impl=impl, **options), expected)


def test_minus_infinity_is_never_drawn(impl: str, device: str) -> None:
    logits = torch.full((5000, 6), -torch.inf, device=device)
    logits[:, 1], logits[:, 4] = 0.0, 1.0
    first = torch.zeros(5000, dtype=torch.int64, device=device)
    for options in ({}, {"top_k": 5}, {"top_p": 0.999999}, {"temperature": 50.0}):
        got = token_stats(logits, seed=3, current=first, impl=impl, **options)
        assert set(got.token.tolist()) == {1, 4}
        assert (got.current_prob == 0).all()
        torch.testing.assert_close(got.gap, torch.ones_like(got.gap))


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e37])
def test_extreme_values(impl: str, device: str, scale: float) -> None:
    logits = (torch.randn(20, 50) * scale).to(device)
    got = token_stats(logits, seed=0, impl=impl)
    p = torch.softmax(logits.double(), dim=1)
    torch.testing.assert_close(got.prob.double(), p.gather(1, got.token[:, None])[:, 0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.logsumexp.double(), torch.logsumexp(logits.double(), dim=1), rtol=1e-6, atol=1e-6)
    assert got.entropy.isfinite().all()
    assert (got.entropy >= 0).all()
    single = token_stats(logits[:, :1], seed=0, impl=impl)
    assert (single.token == 0).all()
    assert (single.p1 == 1).all()
    assert (single.p2 == 0).all()
    assert (single.gap == torch.inf).all()


def test_noncontiguous(impl: str, device: str) -> None:
    logits, current = _logits(9, 33, device), torch.randint(0, 33, (9,), device=device)
    index = torch.randint(0, 1000, (9,), device=device)
    options: dict[str, Any] = {"seed": 4, "top_p": 0.7, "impl": impl}
    expected = token_stats(logits, current=current, row_index=index, **options)
    got = token_stats(strided(logits), current=strided(current), row_index=strided(index), **options)
    assert_all_equal(got, expected)
    wide = torch.randn(9, 2, 33, device=device)  # rows of a [B, L, V] slice
    assert_all_equal(token_stats(wide[:, 1], **options), token_stats(wide[:, 1].contiguous(), **options))


def test_row_is_unchanged_by_its_batch_mates(impl: str, device: str) -> None:
    logits, index = _logits(40, 200, device), torch.arange(40, device=device) * 2**20
    for draw in DRAWS.values():
        options: dict[str, Any] = {"seed": 6, "impl": impl} | draw
        together = token_stats(logits, row_index=index, **options)
        rows = torch.randperm(40)[:11].to(device)
        some = token_stats(logits[rows], row_index=index[rows], **options)
        assert_all_equal(some, [column[rows] for column in together])
        one = token_stats(logits[7:8], row_index=index[7:8], **options)
        assert_all_equal(one, [column[7:8] for column in together])


def test_draw_is_keyed_by_seed_step_and_row(impl: str, device: str) -> None:
    logits = torch.zeros(64, 100, device=device)

    def draw(**key: Any) -> list[int]:
        return token_stats(logits, impl=impl, **({"seed": 1} | key)).token.tolist()

    base = draw()
    assert len(set(base)) > 20, "equal rows draw different tokens"
    assert draw(row_index=torch.arange(64, device=device)) == base
    assert draw(step=torch.tensor([0], device=device), seed=torch.tensor([1], device=device)) == base
    for other in ({"seed": 2}, {"step": 1}, {"row_index": torch.arange(64, device=device) + 2**32}):
        assert draw(**other) != base
    assert draw(seed=-1) == draw(seed=2**64 - 1)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (draw(seed=None, generator=g) for g in generators)
    assert first == second
    assert draw(seed=None, generator=generators[0]) != first


F32, I64 = torch.float32, torch.int64


@bad_inputs(
    ("logits", zeros(F32, 7), ValueError, r"^logits must be .*\[N, V\], got float32\[7\]"),
    ("logits", zeros(F32, 2, 3, 7), ValueError, r"^logits must be .*\[N, V\], got float32\[2, 3, 7\]"),
    ("logits", zeros(I64, 3, 7), TypeError, r"^logits must be float32/.*, got int64"),
    ("logits", zeros(F32, 3, 0), ValueError, r"^logits must have at least one column"),
    ("temperature", lambda d: -0.5, ValueError, r"^temperature must be in \[0, .*, got -0.5"),
    ("temperature", lambda d: float("nan"), ValueError, r"^temperature must be in .*, got nan"),
    ("temperature", lambda d: float("inf"), ValueError, r"^temperature must be .*, got inf"),
    ("top_p", lambda d: 0.0, ValueError, r"^top_p must be in \(0, 1\], got 0.0"),
    ("top_p", lambda d: 1.5, ValueError, r"^top_p must be in \(0, 1\], got 1.5"),
    ("top_p", lambda d: float("nan"), ValueError, r"^top_p must be in \(0, 1\], got nan"),
    ("top_k", lambda d: 0, ValueError, r"^top_k must be in \[1, .*\], got 0"),
    ("top_k", lambda d: 2.5, TypeError, r"^top_k must be an int, got 2.5"),
    ("forbid", lambda d: 1.0, TypeError, r"^forbid must be an int, got 1.0"),
    ("forbid", lambda d: -1, ValueError, r"^forbid must be in \[0, 6\], got -1"),
    ("forbid", lambda d: 7, ValueError, r"^forbid must be in \[0, 6\], got 7"),
    ("current", zeros(I64, 4), ValueError, r"^current must be int64\[3\], got int64\[4\]"),
    ("current", zeros(F32, 3), TypeError, r"^current must be int64\[3\], got float32"),
    ("current", elsewhere(I64, 3), ValueError, r"^current must be on .*, got .* on meta"),
    ("row_index", zeros(I64, 3, 1), ValueError, r"^row_index must be int64\[3\], got int64\[3, 1\]"),
    ("row_index", elsewhere(I64, 3), ValueError, r"^row_index must be on"),
    ("seed", lambda d: 0.5, TypeError, r"^seed must be an int, got 0.5"),
    ("seed", zeros(I64, 3), ValueError, r"^seed must have one element, got int64\[3\]"),
    ("step", zeros(F32, 1), TypeError, r"^step must be int64, got float32"),
    ("impl", lambda d: "numpy", ValueError, r"^impl must be 'auto', 'ext' or 'reference', got 'numpy'"),
)
def test_rejects_bad_input(impl: str, device: str, bad: BadInput) -> None:
    bad.check(token_stats, {"logits": _logits(3, 7, device), "seed": 0, "impl": impl}, device)


@pytest.mark.ext
@pytest.mark.parametrize("current", [True, False], ids=["current", "none"])
def test_opcheck(device: str, current: bool) -> None:
    scalars = [torch.tensor([n], device=device) for n in (3, 4)]
    index = torch.arange(5, device=device)
    arguments = (_logits(5, 9, device), index if current else None, index, *scalars, 0.7, 3, 0.9, 2)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # Without current its probability is NaN, which the last one cannot compare.
    torch.library.opcheck(torch.ops.diffullama.token_stats.default, arguments, test_utils=utils[: 4 if current else 3])


@pytest.mark.ext
def test_compile_fullgraph(device: str) -> None:
    def step(logits: Tensor, seed: Tensor, step: Tensor, current: Tensor) -> TokenStats:
        return token_stats(logits, top_p=0.9, forbid=1, seed=seed, step=step, current=current, impl="ext")

    calls = [
        (
            _logits(4, 30, device),
            torch.tensor([n], device=device),
            torch.tensor([n], device=device),
            torch.full((4,), n, device=device),
        )
        for n in range(5)
    ]
    assert compiled_frames(step, calls, assert_all_equal) == 1


def test_deterministic(impl: str, device: str) -> None:
    logits = _logits(64, 3000, device)
    for draw in DRAWS.values():
        first, second = (token_stats(logits, seed=1, impl=impl, **draw) for _ in range(2))
        assert_all_equal(first, second)
