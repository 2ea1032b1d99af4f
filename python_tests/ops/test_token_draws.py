# SPDX-License-Identifier: Apache-2.0
"""The distribution token_stats draws from: a million draws of one row each, and the rules of transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from oracles import truncated
from scipy.stats import chisquare
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from diffullama_ext import token_stats

pytestmark = pytest.mark.op("token_stats")

N_DRAWS, N_SIMULATED = 1_000_000, 6_000
LOGITS = [2.0, -1.0, 0.5, 2.0, 9.0, 1.2, -30.0, 0.0, 1.9, 0.5, -0.3, 1.0]
FORBID = 4  # the largest by far
CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"temperature": 1.5, "top_k": 5},
    "top-p": {"top_p": 0.8},
    "all": {"temperature": 2.0, "top_k": 9, "top_p": 0.9},
}


@pytest.mark.parametrize("case", CASES)
def test_a_million_draws(impl: str, device: str, case: str, is_simulated: bool) -> None:
    """Chi-square against the truncated softmax; the support is exactly the nucleus; the mask id is never drawn."""
    n = N_DRAWS if impl == "ext" else N_DRAWS // 4  # sorting float64 rows is slow
    n = N_SIMULATED if is_simulated else n
    rows = torch.tensor([LOGITS], device=device).expand(n, -1)
    got = token_stats(rows, forbid=FORBID, seed=20, impl=impl, **CASES[case])
    defaults = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "forbid": FORBID}
    p = truncated(LOGITS, **(defaults | CASES[case]))
    counts = torch.bincount(got.token.cpu(), minlength=len(LOGITS)).numpy()
    assert counts[FORBID] == 0
    assert counts[p == 0].sum() == 0
    assert (counts[p * n > 20] > 0).all()
    likely = p * n > 5  # the chi-square approximation needs expected counts
    expected = np.append(p[likely], p[~likely].sum()) * n
    observed = np.append(counts[likely], counts[~likely].sum())
    kept = expected > 0
    assert chisquare(observed[kept], expected[kept], sum_check=False).pvalue > 1e-3
    torch.testing.assert_close(got.sample_prob.double().cpu(), torch.from_numpy(p)[got.token.cpu()], rtol=1e-6, atol=0)


def test_draws_are_uncorrelated(impl: str, device: str, is_simulated: bool) -> None:
    """Neighbouring rows, steps and seeds draw independently: the 4x4 table of pairs is flat."""
    n = N_SIMULATED if is_simulated else 200_000
    rows = torch.zeros(1, 4, device=device).expand(n, -1)
    base, step, seed = (token_stats(rows, seed=s, step=t, impl=impl).token for s, t in ((1, 0), (1, 1), (2, 0)))
    for a, b in ((base[:-1], base[1:]), (base, step), (base, seed)):
        table = torch.bincount((4 * a + b).cpu(), minlength=16).numpy()
        assert chisquare(table).pvalue > 1e-3


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 10, 1.0), (1.0, None, 0.9), (1.3, 12, 0.7)])
def test_truncation_is_that_of_transformers(
    impl: str, device: str, temperature: float, top_k: int | None, top_p: float
) -> None:
    """The drawn token has the probability that Hugging Face's warpers leave it, so both keep the same tokens."""
    logits = 3 * torch.randn(500, 60, device=device)
    got = token_stats(logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=1, impl=impl)
    ids = torch.zeros(500, 1, dtype=torch.int64, device=device)
    warped = TemperatureLogitsWarper(temperature)(ids, logits.double())
    if top_k is not None:
        warped = TopKLogitsWarper(top_k)(ids, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(ids, warped)
    p = torch.softmax(warped, dim=1).gather(1, got.token[:, None])[:, 0]
    torch.testing.assert_close(got.sample_prob.double(), p, rtol=1e-5, atol=1e-8)
