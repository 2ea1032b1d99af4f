# SPDX-License-Identifier: Apache-2.0
"""Metrics of traces and texts, by values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffullama_ext.sampling import fill
from diffullama_ext.sampling.metrics import (
    calibration,
    commitment_step,
    distinct_n,
    early_answer_step,
    ngram_entropy,
    remask_sensitivity,
    repetition,
)
from diffullama_ext.sampling.trace import Trace

# [T = 4, B = 1, L = 5]: settled at 0; changes to frame 2; flips back at the end; -1 until 3; two changes
PREDICTION = torch.tensor([[[7, 1, 5, -1, 1]], [[7, 2, 6, -1, 2]], [[7, 3, 6, -1, 3]], [[7, 3, 5, 4, 3]]])


def test_commitment_step():
    assert commitment_step(PREDICTION).tolist() == [[0, 2, 3, 3, 2]]


def test_early_answer_step():
    region = torch.tensor([[True, True, False, False, True]])
    answer = torch.tensor([[7, 3, 0, 0, 3]])
    assert early_answer_step(PREDICTION, answer, region).tolist() == [2]
    assert early_answer_step(PREDICTION, answer, ~region).tolist() == [-1]
    assert early_answer_step(PREDICTION, answer, torch.zeros_like(region)).tolist() == [0]
    right_then_wrong = torch.tensor([[[7]], [[8]]])
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    assert early_answer_step(right_then_wrong, torch.tensor([[7]]), everywhere).tolist() == [-1]


def test_calibration_by_hand():
    """Bins of a half: .2 wrong, .4 right | .6 wrong, 1. right, 1. right."""
    confidence = torch.tensor([0.2, 0.4, 0.6, 1.0, 1.0], dtype=torch.float64)
    correct = torch.tensor([False, True, False, True, True])
    out = calibration(confidence, correct, bins=2)
    assert out.counts.tolist() == [2, 3]
    assert out.confidence.tolist() == pytest.approx([0.3, 2.6 / 3])
    assert out.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    assert out.ece == pytest.approx(2 / 5 * 0.2 + 3 / 5 * (2.6 / 3 - 2 / 3))
    assert out.brier == pytest.approx((0.04 + 0.36 + 0.36) / 5)
    # pairs (right, wrong): (.4 > .2), (.4 < .6), (1 > both) twice: 5 of 6
    assert out.auc == pytest.approx(5 / 6)


def test_calibration_at_the_edges():
    out = calibration(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([False, True, True]), bins=2)
    assert out.counts.tolist() == [2, 1]  # 0 is in the first bin, and .5 ends it
    assert math.isnan(calibration(torch.tensor([0.5]), torch.tensor([True])).auc)
    assert calibration(torch.tensor([0.5, 0.5]), torch.tensor([True, False])).auc == 0.5
    assert calibration(torch.tensor([0.5]), torch.tensor([True]), bins=3).accuracy.isnan().tolist() == [
        True,
        False,
        True,
    ]
    for bad in (torch.tensor([1.5]), torch.tensor([math.nan]), torch.tensor([])):
        with pytest.raises(ValueError, match=r"confidence must be .* in \[0, 1\]"):
            calibration(bad, torch.ones(len(bad), dtype=torch.bool))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20))
def test_auc_is_the_share_of_ordered_pairs(items):
    right = [c for c, is_right in items if is_right]
    wrong = [c for c, is_right in items if not is_right]
    auc = calibration(torch.tensor([c / 4 for c, _ in items]), torch.tensor([r for _, r in items])).auc
    if not right or not wrong:
        assert math.isnan(auc)
    else:
        wins = sum((r > w) + (r == w) / 2 for r in right for w in wrong)
        assert auc == pytest.approx(wins / len(right) / len(wrong))


def test_text_metrics_by_hand():
    texts = ["abab", "c"]  # letters a a b b c; pairs ab ba ab
    assert ngram_entropy(texts, 1) == pytest.approx(2 * 0.4 * math.log(2.5) + 0.2 * math.log(5))
    assert ngram_entropy(texts, 2) == pytest.approx(2 / 3 * math.log(1.5) + 1 / 3 * math.log(3))
    assert distinct_n(texts, 1) == pytest.approx(3 / 5)
    assert distinct_n(texts, 2) == pytest.approx(2 / 3)
    assert repetition(texts, 2) == pytest.approx(1 / 3)  # "c" has no pair
    assert repetition([[1, 2, 1, 2], [1, 2, 3, 4]], 1) == pytest.approx((0.5 + 0) / 2)
    assert ngram_entropy(["aaaa"], 2) == 0.0
    for metric in (ngram_entropy, distinct_n, repetition):
        assert math.isnan(metric(texts, 9))
        with pytest.raises(ValueError, match="n must be in"):
            metric(texts, 0)


def test_remask_sensitivity(one_hot_denoiser):
    """A model that knows the answer loses nothing; one that then writes one token everywhere loses all it re-writes."""
    answer = torch.arange(1, 13)[None].expand(3, 12).contiguous()
    masked = torch.ones(3, 12, dtype=torch.bool)
    masked[:, 0] = False
    denoise, trace = one_hot_denoiser(answer, 14, True), Trace()
    fill(denoise, answer, masked, mask_id=0, steps=4, on_step=trace, temperature=0.0)

    def finish(xt, left):
        assert (xt[left] == 0).all()
        assert torch.equal(xt[~left], answer[~left])
        return fill(denoise, xt, left, mask_id=0, steps=4, temperature=0.0).xt

    for step, drop in enumerate(remask_sensitivity(trace, finish, answer)):
        assert (drop.step, drop.direct, drop.collateral) == (step, 0.0, 0.0)
        assert 0 < drop.n_remasked < 33
    spoilt = remask_sensitivity(trace, lambda xt, left: torch.where(left, 13, xt), answer, fraction=1.0)
    last = spoilt[-1]
    assert (last.n_remasked, last.direct) == (33, 1.0)
    assert math.isnan(last.collateral)
    # after the first step ceil(11 / 4) = 3 positions a row are committed; the other 8 are wrong as well
    assert spoilt[0][:3] == (0, 9, 1.0)
    assert spoilt[0].collateral == 1.0
    twice = [remask_sensitivity(trace, finish, answer, seed=seed) for seed in (1, 1, 2)]
    assert [d.n_remasked for d in twice[0]] == [d.n_remasked for d in twice[1]] != [d.n_remasked for d in twice[2]]
