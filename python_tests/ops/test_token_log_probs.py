# SPDX-License-Identifier: Apache-2.0
"""token_log_probs: minus the loss of every masked token, without a gradient."""

import pytest
import torch
from comparison import BadInput, assert_all_equal, assert_no_worse_than_torch, bad_inputs, strided, zeros
from loss_cases import Case, as_dtype, linear_case
from oracles import dense_nll

from diffullama_ext import token_log_probs

pytestmark = pytest.mark.op("linear_shifted_nll")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 9, 4, 6), (2, 33, 8, 130), (0, 5, 2, 3), (2, 0, 2, 3)], ids=str)
def test_matches_oracle(
    impl: str, device: str, shape: tuple[int, int, int, int], shift: bool, softcap: float | None
) -> None:
    case = linear_case(*shape, device)
    got = token_log_probs(
        case.hidden, case.weight, case.x0, case.masked, bias=case.bias, shift=shift, softcap=softcap, impl=impl
    )
    expected = -dense_nll(case.logits(), case.x0, case.masked, shift, softcap=softcap)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=1e-12)
    assert not got.requires_grad
    assert (got[~case.masked] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_torch(impl: str, device: str, dtype: torch.dtype) -> None:
    case = linear_case(2, 40, 64, 515, device, dtype)
    exact = as_dtype(case, torch.float64)
    got = token_log_probs(case.hidden, case.weight, case.x0, case.masked, bias=case.bias, impl=impl)
    assert got.dtype == torch.float32
    truth, low = (
        -dense_nll(logits, case.x0, case.masked, True).detach() for logits in (exact.logits(), case.logits().float())
    )
    assert_no_worse_than_torch(got, truth, low)


def test_independent_of_chunk_rows_and_layout(impl: str, device: str) -> None:
    case = linear_case(3, 20, 8, 37, device)

    def log_probs(case: Case, chunk_rows: int | None) -> torch.Tensor:
        return token_log_probs(
            case.hidden, case.weight, case.x0, case.masked, bias=case.bias, chunk_rows=chunk_rows, impl=impl
        )

    whole = log_probs(case, None)
    awkward = Case(*(strided(x) for x in case))
    for got in (log_probs(case, 1), log_probs(case, 7), log_probs(awkward, None)):
        torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)
    assert_all_equal([log_probs(case, None)], [whole])


@bad_inputs(
    ("hidden", zeros(torch.float32, 4, 3), ValueError, r"^hidden must be .*\[B, L, H\], got float32\[4, 3\]"),
    ("lm_head_weight", zeros(torch.float32, 3, 6), ValueError, r"^lm_head_weight must be float32\[V, 3\], got"),
    ("bias", zeros(torch.float32, 5), ValueError, r"^bias must be float32\[6\], got float32\[5\]"),
    ("x0", zeros(torch.int32, 2, 4), TypeError, r"^x0 must be int64\[2, 4\], got int32"),
    ("masked", zeros(torch.bool, 2, 5), ValueError, r"^masked must be bool\[2, 4\], got bool\[2, 5\]"),
    ("softcap", lambda d: -1.0, ValueError, r"^softcap must be in \(0, inf\], got -1.0"),
    ("chunk_rows", lambda d: 0, ValueError, r"^chunk_rows must be in \[1, .*\], got 0"),
)
def test_rejects_bad_input(impl: str, device: str, bad: BadInput) -> None:
    case = linear_case(2, 4, 3, 6, device, torch.float32)
    arguments = {"hidden": case.hidden, "lm_head_weight": case.weight, "x0": case.x0, "masked": case.masked}
    bad.check(token_log_probs, arguments | {"bias": case.bias, "impl": impl}, device)
