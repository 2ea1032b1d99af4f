# SPDX-License-Identifier: Apache-2.0
"""The lengths, alignments and confidences at which the CUDA unmask changes its way; on the CPU ordinary cases."""

from typing import Any

import pytest
import torch
from comparison import assert_all_equal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffullama_ext import unmask

pytestmark = [pytest.mark.op("unmask"), pytest.mark.ext]

RULES = ["quota", "threshold", "factor", "random"]


def _inputs(confidence: Tensor, amount: float, *, eligible: float = 0.9) -> dict[str, Any]:
    shape, device = confidence.shape, confidence.device
    masked = torch.rand(shape) < eligible
    return {
        "xt": torch.randint(0, 50, shape).to(device),
        "masked": masked.to(device),
        "token": torch.randint(-1, 30, shape).to(device),
        "confidence": confidence,
        "amount": torch.full(shape[:1], float(amount), device=device),
    }


def _agree(inputs: dict[str, Any], rule: str, given: dict[str, Any] | None = None) -> None:
    ours = unmask(**(given or inputs), rule=rule, seed=3, step=1, impl="ext")
    assert_all_equal(ours, unmask(**inputs, rule=rule, seed=3, step=1, impl="reference"))


AMOUNTS = {"quota": 37.0, "threshold": 0.97, "factor": 2.0, "random": 0.1}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 3, 4, 2045, 2048, 2051, 6000, 8191, 8192, 8195, 8196, 9001])
def test_lengths(device: str, rule: str, length: int) -> None:
    """4 positions a thread at a time, 2048 a round of the block; keys are kept in shared memory up to 8192."""
    confidence = torch.rand(2, length).to(device)
    for amount in (AMOUNTS[rule], AMOUNTS[rule] / 30):
        _agree(_inputs(confidence, amount), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("argument", ["xt", "masked", "token", "confidence"])
def test_misaligned(device: str, rule: str, argument: str) -> None:
    inputs = _inputs(torch.rand(2, 64).to(device), AMOUNTS[rule])
    buffer = torch.zeros(129, dtype=inputs[argument].dtype, device=device)
    view = buffer[1:].view(2, 64)
    view.copy_(inputs[argument])
    _agree(inputs, rule, inputs | {argument: view})


def _clustered(device: str) -> dict[str, Tensor]:
    """Confidences whose keys crowd: what one round of 512 equal parts of their range cannot tell apart."""
    n = 700
    near = 0.5 + 2.0**-24 * torch.arange(n)[torch.randperm(n)]
    far = near.clone()
    far[5], far[600] = -torch.inf, torch.inf
    levels = torch.tensor([1.0, 0.999, 0.25])[torch.randint(0, 3, (n,))]
    rows = {"equal": torch.ones(n), "neighbours": near, "outliers": far, "levels": levels}
    rows["mostly one"] = torch.where(torch.rand(n) < 0.9, 1.0, torch.rand(n))
    # The part of the keys' range that holds -inf would end behind the last key of all.
    rows["mostly none"] = torch.where(torch.rand(n) < 0.9, -torch.inf, 1.0 - 2.0**-24)
    rows["both zeros"] = torch.where(torch.rand(n) < 0.5, -0.0, 0.0)
    return {name: row[None].to(device) for name, row in rows.items()}


@pytest.mark.parametrize("quota", [1, 2, 63, 64, 65, 300, 560, 569, 600])
@pytest.mark.parametrize("name", _clustered("cpu"))
def test_crowded_keys(device: str, name: str, quota: int) -> None:
    confidence = _clustered(device)[name]
    for length in (64, 65, 700):  # at most 64 keys are ranked without rounds
        _agree(_inputs(confidence[:, :length].contiguous(), quota), "quota")
    _agree(_inputs(confidence.repeat(1, 12), 12 * quota), "quota")  # keys made again in every round


@pytest.mark.parametrize("factor", [0.0, 1e-6, 0.5, 30.0, 400.0, 1e9, torch.inf, -1e-3, -2.0, -300.0, -torch.inf])
@pytest.mark.parametrize("name", _clustered("cpu"))
def test_factor(device: str, name: str, factor: float) -> None:
    """The end of the prefix is looked for part by part; a negative factor's bound falls, so it may be in any part."""
    confidence = _clustered(device)[name]
    for c in (
        confidence,
        confidence[:, :60].contiguous(),
        confidence + 0.7,
        1 + 2 / (1 + torch.arange(700.0))[None].to(device),
    ):
        _agree(_inputs(c, factor, eligible=1.0), "factor")


@given(
    length=st.integers(1, 400),
    factor=st.floats(-8, 8, width=32),
    spread=st.sampled_from([0.0, 1e-6, 0.1, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_factor_of_any_sign(device: str, length: int, factor: float, spread: float, seed: int) -> None:
    """Confidences along 1 - factor / n, where the rule's bound runs."""
    torch.manual_seed(seed)
    bound = 1 - factor / (2 + torch.arange(float(length)))
    confidence = (bound.sort(descending=True).values + spread * torch.randn(length))[torch.randperm(length)]
    _agree(_inputs(confidence[None].to(device), factor, eligible=1.0), "factor")


@given(
    length=st.integers(1, 3000),
    levels=st.sampled_from([1, 2, 70, 100_000]),
    share=st.floats(0, 1.1),
    seed=st.integers(0, 2**32),
)
def test_quota_of_any_share(device: str, length: int, levels: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    confidence = torch.randint(0, levels, (1, length)) / levels
    _agree(_inputs(confidence.to(device), share * length), "quota")


def test_words_of_all_ones_are_eligible(device: str) -> None:
    """Random word 0xffffffff has the last rank of all; the key of ineligible entries lies behind it."""
    inputs = _inputs(torch.rand(3, 257).to(device), 1.0)
    got = unmask(**inputs, rule="random", impl="ext")
    assert torch.equal(got.committed, inputs["masked"] & (inputs["token"] >= 0))
