# SPDX-License-Identifier: Apache-2.0
"""unmask: every rule against a straight-line oracle, and the promises a sampler relies on."""

from typing import Any

import pytest
import torch
from comparison import BadInput, assert_all_equal, bad_inputs, compiled_frames, elsewhere, strided, zeros
from hypothesis import given
from hypothesis import strategies as st
from oracles import MASK32, TAG_UNMASK, committed, words_by_position
from torch import Tensor

from diffullama_ext import Unmasked, unmask

pytestmark = pytest.mark.op("unmask")

RULES = ["quota", "threshold", "factor", "random"]
LEVELS = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 0.3, 0.5, 0.5 + 2**-24, 0.9, 1.0, torch.inf, torch.nan])


def _inputs(
    batch: int, length: int, rule: str, device: str, *, seed: int = 0, ties: bool = True, eligible: float = 0.6
) -> dict[str, Any]:
    """Keyword arguments of unmask; with ties, confidences come from eleven levels, NaN and both zeros among them."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length)
    confidence = torch.rand(shape, generator=g)
    if ties:
        confidence = LEVELS[torch.randint(0, len(LEVELS), shape, generator=g)]
    amounts = {
        "quota": torch.randint(0, length + 3, (batch,), generator=g).float(),
        "threshold": torch.tensor([0.0, 0.5, 0.95, 2.0])[torch.randint(0, 4, (batch,), generator=g)],
        "factor": 3 * torch.rand(batch, generator=g),
        "random": torch.tensor([0.0, 0.02, 0.5, 1.0])[torch.randint(0, 4, (batch,), generator=g)],
    }
    tensors = {
        "xt": torch.randint(0, 50, shape, generator=g),
        "masked": torch.rand(shape, generator=g) < eligible,
        "token": torch.randint(-1, 8, shape, generator=g),
        "confidence": confidence,
        "amount": amounts[rule],
        "sample_index": torch.randint(-(2**40), 2**40, (batch,), generator=g),
    }
    return {name: x.to(device) for name, x in tensors.items()} | {"rule": rule}


def _oracle(inputs: dict[str, Any], seed: int, step: int) -> Unmasked:
    xt, masked, token = (inputs[name].cpu() for name in ("xt", "masked", "token"))
    index = inputs["sample_index"].tolist()
    words = words_by_position(index, xt.shape[1], seed, TAG_UNMASK, high=step & MASK32)
    out, written, remaining = xt.clone(), torch.zeros_like(masked), []
    for b in range(xt.shape[0]):
        row = (masked[b].tolist(), token[b].tolist(), inputs["confidence"][b].cpu().numpy())
        for j in committed(*row, float(inputs["amount"][b]), inputs["rule"], words[b]):
            out[b, j], written[b, j] = token[b, j], True
        remaining.append(int((masked[b] & ~written[b]).sum()))
    values = (out, written, torch.tensor(remaining, dtype=torch.int64))
    return Unmasked(*(x.to(inputs["xt"].device) for x in values))


@pytest.mark.parametrize("rule", RULES)
@given(
    batch=st.integers(0, 4),
    length=st.integers(0, 300),
    seed=st.integers(0, 2**40),
    ties=st.booleans(),
    eligible=st.sampled_from([0.0, 0.02, 0.6, 1.0]),
    step=st.integers(0, 2**33),
)
def test_matches_oracle(
    impl: str, device: str, rule: str, batch: int, length: int, seed: int, ties: bool, eligible: float, step: int
) -> None:
    inputs = _inputs(batch, length, rule, device, seed=seed, ties=ties, eligible=eligible)
    assert_all_equal(unmask(**inputs, seed=seed - 2**39, step=step, impl=impl), _oracle(inputs, seed - 2**39, step))


@pytest.mark.ext
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 63), (8, 2048), (2, 5000), (4, 0), (0, 7)])
def test_matches_reference(device: str, rule: str, batch: int, length: int) -> None:
    for ties in (True, False):
        inputs = _inputs(batch, length, rule, device, ties=ties)
        ours, expected = (unmask(**inputs, seed=2, step=3, impl=impl) for impl in ("ext", "reference"))
        assert_all_equal(ours, expected)


def _row(device: str, confidence: list[float], amount: float, **changed: Any) -> dict[str, Any]:
    length = len(confidence)
    return {
        "xt": torch.full((1, length), 9, device=device),
        "masked": torch.ones(1, length, dtype=torch.bool, device=device),
        "token": torch.arange(length, device=device)[None],
        "confidence": torch.tensor([confidence], device=device),
        "amount": torch.tensor([float(amount)], device=device),
    } | changed


@pytest.mark.parametrize(
    ("rule", "confidence", "amount", "expected"),
    [
        ("quota", [0.1, 0.9, 0.5, 0.9], 2, [1, 3]),
        ("quota", [0.5, 0.5, 0.5, 0.5], 3, [0, 1, 2]),
        ("quota", [-0.0, 0.0, -1.0], 1, [0]),
        ("quota", [0.2, 0.7], 0, [1]),
        ("quota", [0.2, 0.7], 100, [0, 1]),
        ("quota", [float("nan"), -float("inf"), 0.1], 2, [1, 2]),
        ("threshold", [0.9, 0.1, 0.95], 0.9, [0, 2]),
        ("threshold", [0.3, 0.6, 0.6], 0.9, [1]),
        ("threshold", [float("nan"), 0.6], 0.9, [1]),
        ("factor", [0.99, 0.2, 0.95, 0.9], 0.2, [0, 2]),  # 0.9, 0.9333, 0.95 needed: 0.99 and 0.95 pass, 0.9 does not
        ("factor", [0.1, 0.2], 0.0, [1]),
        ("factor", [0.1, 0.2], 3.0, [0, 1]),
        ("random", [0.1, 0.2, 0.3], 1.0, [0, 1, 2]),
    ],
)
def test_worked_by_hand(
    impl: str, device: str, rule: str, confidence: list[float], amount: float, expected: list[int]
) -> None:
    got = unmask(**_row(device, confidence, amount), rule=rule, impl=impl)
    assert got.committed[0].nonzero().flatten().tolist() == expected
    assert [j for j in range(len(confidence)) if got.xt[0, j] != 9] == expected
    assert got.remaining.tolist() == [len(confidence) - len(expected)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("amount", [-torch.inf, -1.0, 0.0, torch.inf, torch.nan], ids=str)
def test_commits_at_least_one_whatever_the_amount(impl: str, device: str, rule: str, amount: float) -> None:
    inputs = _inputs(6, 40, rule, device) | {"amount": torch.full((6,), amount, device=device)}
    eligible = inputs["masked"] & (inputs["token"] >= 0) & ~inputs["confidence"].isnan()
    got = unmask(**inputs, impl=impl)
    assert (got.committed.sum(dim=1) >= 1).all()
    assert not (got.committed & ~eligible).any()


@pytest.mark.parametrize("rule", RULES)
def test_extreme_values(impl: str, device: str, rule: str) -> None:
    """Nothing masked, no token and no confidence leave a row as it is."""
    inputs = _inputs(4, 50, rule, device, ties=False) | {"amount": torch.full((4,), 7.0, device=device)}
    inputs["masked"][0] = False
    inputs["token"][1] = -1
    inputs["confidence"][2] = torch.nan
    got = unmask(**inputs, impl=impl)
    assert torch.equal(got.xt[:3], inputs["xt"][:3])
    assert got.committed.any(dim=1).tolist() == [False, False, False, True]
    assert got.remaining[:3].tolist() == inputs["masked"][:3].sum(dim=1).tolist()


@pytest.mark.parametrize("rule", RULES)
def test_fixed_positions_and_inputs_stay(impl: str, device: str, rule: str) -> None:
    inputs = _inputs(5, 80, rule, device)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    got = unmask(**inputs, impl=impl)
    fixed = ~inputs["masked"]
    assert torch.equal(got.xt[fixed], inputs["xt"][fixed])
    assert not got.committed[fixed].any()
    assert_all_equal([inputs[name] for name in before], before.values())


@given(length=st.integers(1, 64), steps=st.integers(1, 70), seed=st.integers(0, 2**20))
def test_quotas_are_exact(impl: str, device: str, length: int, steps: int, seed: int) -> None:
    """ceil(masked / steps left), step after step, commits exactly that many and ends with nothing masked."""
    inputs = _inputs(2, length, "quota", device, seed=seed, ties=False)
    inputs["token"].clamp_(min=0)
    for left in range(steps, 0, -1):
        masked = inputs["masked"].sum(dim=1)
        inputs["amount"] = (-(-masked // left)).float()
        got = unmask(**inputs, impl=impl)
        assert torch.equal(got.committed.sum(dim=1), inputs["amount"].long())
        inputs |= {"xt": got.xt, "masked": inputs["masked"] & ~got.committed}
        assert torch.equal(got.remaining, inputs["masked"].sum(dim=1))
    assert not inputs["masked"].any()


def test_random_rule_is_independent_of_the_batch(impl: str, device: str) -> None:
    inputs = _inputs(6, 100, "random", device)
    together = unmask(**inputs, seed=4, step=2, impl=impl)
    rows = torch.tensor([5, 1, 2], device=device)
    some: dict[str, Any] = {name: x[rows] if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert_all_equal(unmask(**some, seed=4, step=2, impl=impl), [x[rows] for x in together])


def test_random_rule_has_the_rate_and_the_keys(impl: str, device: str) -> None:
    n = 400_000
    inputs = _row(device, [0.5] * n, 0.25)

    def chosen(**key: Any) -> Tensor:
        return unmask(**inputs, rule="random", impl=impl, **key).committed[0]

    base = chosen(seed=1)
    assert abs(int(base.sum()) - n / 4) < 4 * (n * 0.25 * 0.75) ** 0.5
    for other in ({"seed": 2}, {"seed": 1, "step": 1}, {"seed": 1, "sample_index": torch.tensor([1], device=device)}):
        both = int((base & chosen(**other)).sum())
        assert abs(both - n / 16) < 4 * (n / 16 * 15 / 16) ** 0.5, "independent draws"
    tensors = {name: torch.tensor([value], device=device) for name, value in (("seed", 1), ("step", 0))}
    assert torch.equal(chosen(**tensors), base)
    assert torch.equal(chosen(seed=1, sample_index=torch.tensor([2**32], device=device)), base), "low 32 bits act"


@pytest.mark.parametrize("rule", RULES)
def test_noncontiguous(impl: str, device: str, rule: str) -> None:
    inputs = _inputs(3, 41, rule, device)
    awkward: dict[str, Any] = {name: strided(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert_all_equal(unmask(**awkward, seed=1, impl=impl), unmask(**inputs, seed=1, impl=impl))


F32, I64 = torch.float32, torch.int64


@bad_inputs(
    ("xt", zeros(I64, 5), ValueError, r"^xt must be int64\[B, L\], got int64\[5\]"),
    ("xt", zeros(F32, 2, 5), TypeError, r"^xt must be int64\[B, L\], got float32"),
    ("masked", zeros(torch.bool, 2, 4), ValueError, r"^masked must be bool\[2, 5\], got bool\[2, 4\]"),
    ("masked", zeros(I64, 2, 5), TypeError, r"^masked must be bool\[2, 5\], got int64"),
    ("token", zeros(I64, 5, 2), ValueError, r"^token must be int64\[2, 5\], got int64\[5, 2\]"),
    ("token", elsewhere(I64, 2, 5), ValueError, r"^token must be on .*, got .* on meta"),
    ("confidence", zeros(torch.float64, 2, 5), TypeError, r"^confidence must be float32\[2, 5\], got float64"),
    ("confidence", zeros(F32, 2), ValueError, r"^confidence must be float32\[2, 5\], got float32\[2\]"),
    ("confidence", elsewhere(F32, 2, 5), ValueError, r"^confidence must be on"),
    ("amount", zeros(F32, 1), ValueError, r"^amount must be float32\[2\], got float32\[1\]"),
    ("amount", zeros(I64, 2), TypeError, r"^amount must be float32\[2\], got int64"),
    ("amount", lambda d: 3, TypeError, r"^amount must be a tensor float32\[2\], got int"),
    ("rule", lambda d: "entropy", ValueError, r"^rule must be one of 'quota'.*, got 'entropy'"),
    ("seed", lambda d: None, TypeError, r"^seed must be a number or a one-element tensor, got NoneType"),
    ("step", zeros(F32, 1), TypeError, r"^step must be int64, got float32"),
    ("sample_index", zeros(I64, 3), ValueError, r"^sample_index must be int64\[2\], got int64\[3\]"),
    ("impl", lambda d: "fused", ValueError, r"^impl must be 'auto', 'ext' or 'reference', got 'fused'"),
)
def test_rejects_bad_input(impl: str, device: str, bad: BadInput) -> None:
    bad.check(unmask, _inputs(2, 5, "quota", device) | {"impl": impl}, device)


@pytest.mark.ext
@pytest.mark.parametrize("rule", RULES)
def test_opcheck(device: str, rule: str) -> None:
    inputs = _inputs(2, 9, rule, device)
    keys = [torch.tensor([n], device=device) for n in (1, 2)]
    names = ("xt", "masked", "token", "confidence", "amount")
    arguments = (*(inputs[name] for name in names), *keys, inputs["sample_index"], rule)
    torch.library.opcheck(torch.ops.diffullama.unmask.default, arguments)


@pytest.mark.ext
@pytest.mark.parametrize("rule", RULES)
def test_compile_fullgraph(device: str, rule: str) -> None:
    def step(inputs: dict[str, Tensor], seed: Tensor, step: Tensor) -> Unmasked:
        return unmask(**inputs, rule=rule, seed=seed, step=step, impl="ext")

    calls = []
    for n in range(4):
        inputs = _inputs(3, 33, rule, device, seed=n)
        del inputs["rule"]
        calls.append((inputs, torch.tensor([n], device=device), torch.tensor([5 * n], device=device)))
    assert compiled_frames(step, calls, assert_all_equal) == 1


@pytest.mark.parametrize("rule", RULES)
def test_deterministic(impl: str, device: str, rule: str) -> None:
    inputs = _inputs(8, 700, rule, device)
    assert_all_equal(*(unmask(**inputs, seed=1, impl=impl) for _ in range(2)))
