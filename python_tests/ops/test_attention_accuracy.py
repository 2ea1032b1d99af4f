# SPDX-License-Identifier: Apache-2.0
"""The 16-bit attention kernels against float64 under the same bits: at most twice the error of torch's attention."""

import pytest
import torch
from attention_cases import MASK_CLASSES, PADDINGS, Case, assert_accurate, cases, inputs_of

pytestmark = [pytest.mark.op("attention"), pytest.mark.ext, pytest.mark.usefixtures("attention_kernel")]

LENGTHS = (1, 17, 63, 64, 65, 127, 128, 129)
WIDTHS = (32, 64, 96, 128, 256)
BF16, F16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("case", cases(LENGTHS, WIDTHS), ids=str)
def test_every_length_and_width(device: str, case: Case) -> None:
    assert_accurate(inputs_of(case, device))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASK_CLASSES)
def test_every_mask(device: str, mask: str, padding: str) -> None:
    """Over more tiles than the ring holds."""
    assert_accurate(inputs_of(Case(330, 330, 64, BF16, (1, 1), mask, padding), device))


@pytest.mark.parametrize("lengths", [(1, 200), (200, 1), (40, 210), (210, 40), (129, 64)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_queries_and_keys_of_other_lengths(device: str, width: int, lengths: tuple[int, int]) -> None:
    for mask, padding in (("none", ""), ("bits of each", "left"), ("blocks", "right")):
        assert_accurate(inputs_of(Case(*lengths, width, F16, (2, 1), mask, padding), device))


@pytest.mark.parametrize("heads", [(12, 12), (8, 2), (7, 1)], ids=str)
def test_grouped_heads(device: str, heads: tuple[int, int]) -> None:
    """The gradients of shared keys are sums over the heads that share them."""
    for width in (32, 64):
        assert_accurate(inputs_of(Case(90, 90, width, BF16, heads, "annealed", batch=1), device))


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
def test_scale(device: str, scale: float) -> None:
    assert_accurate(inputs_of(Case(100, 100, 64, F16, (2, 2), "dead rows", "holes"), device), scale)


@pytest.mark.parametrize("case", cases((1000, 2048), (64, 128)) + cases((1000,), (32, 96, 256)), ids=str)
def test_long(device: str, case: Case) -> None:
    if device == "cpu":
        pytest.skip("minutes in the simulator")
    assert_accurate(inputs_of(case, device))
