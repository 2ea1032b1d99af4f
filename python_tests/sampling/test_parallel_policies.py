# SPDX-License-Identifier: Apache-2.0
"""As many positions as can be trusted: factor, entropy budget and Prophet, against straight lines over one row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from straight_line import MASK, VOCAB, assert_fills, best, one_row, predict, start

from diffullama_ext.sampling import fill, make_policy


def run(denoise, ids, accept):
    """accept(left, predictions) -> how many of the best to commit. -> ids, nfe"""
    nfe = 0
    while MASK in ids:
        left = [j for j in range(len(ids)) if ids[j] == MASK]
        seen = predict(denoise, ids)
        for j in accept(left, seen, nfe):
            ids[j] = seen[j].token
        nfe += 1
    return ids, nfe


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7, 3.0, math.inf])
def test_factor_is_fast_dllms_rule(context_denoiser, factor):
    xt, masked = one_row(33, 0.9)
    denoise = context_denoiser(VOCAB, sharpness=1.5)
    ids, _ = start(xt, masked)

    def accept(left, seen, step):
        ordered = best(left, lambda j: seen[j].prob)
        n = 0
        while n < len(ordered) and seen[ordered[n]].prob >= 1 - factor / (n + 2):  # the (n + 1)-th
            n += 1
        return ordered[: max(n, 1)]

    expected, nfe = run(denoise, ids, accept)
    assert_fills(expected, denoise, xt, masked, make_policy("factor", factor=factor), nfe=nfe)


@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.1, 1.0, 5.0, math.inf])
@pytest.mark.parametrize("order", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("steps", [None, 7])
def test_entropy_budget_is_ebs_rule(context_denoiser, gamma, order, steps):
    xt, masked = one_row(33, 0.9)
    denoise = context_denoiser(VOCAB, sharpness=1.5)
    ids, _ = start(xt, masked)
    key = {"confidence": lambda p: p.prob, "entropy": lambda p: -p.entropy, "margin": lambda p: p.margin}[order]

    def accept(left, seen, step):
        ordered, n = best(left, lambda j: key(seen[j])), 0
        for k in range(1, len(ordered) + 1):
            entropies = [seen[j].entropy for j in ordered[:k]]
            if sum(entropies) - max(entropies) <= gamma:
                n = k
        return ordered[: max(n, 1 if steps is None else -(-len(left) // (steps - step)))]

    expected, nfe = run(denoise, ids, accept)
    policy = make_policy("entropy_budget", gamma=gamma, order=order)
    assert_fills(expected, denoise, xt, masked, policy, steps=steps, nfe=nfe)
    assert gamma < math.inf or nfe == 1


THRESHOLDS = dict(early=3.0, middle=2.0, late=1.2)


@pytest.mark.parametrize("answer", [None, 0, 3, 20, 29, 400])
@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize("block_length", [None, 5])
def test_prophet_stops_when_the_answer_is_decided(context_denoiser, answer, steps, block_length):
    xt, masked = one_row(31)
    denoise = context_denoiser(VOCAB, sharpness=1.5)
    ids, maskable = start(xt, masked)
    region = maskable if answer is None else maskable[answer : answer + 5]
    size, nfe, early = block_length or 30, 0, False
    for step in range(steps):
        left = [j for j in maskable if ids[j] == MASK]
        if not left:
            break
        nfe, seen = nfe + 1, predict(denoise, ids)
        mean_gap = sum(seen[j].gap for j in region) / len(region) if region else -1.0
        progress = step / steps
        needed = 3.0 if progress < 0.33 else 2.0 if progress < 0.67 else 1.2
        if mean_gap >= needed:
            chosen, early = left, len(left) > 1
        else:
            number = min(maskable.index(j) for j in left) // size
            block = [j for j in left if maskable.index(j) // size == number]
            end = min((number + 1) * size, 30) * steps // 30
            chosen = best(block, lambda j: seen[j].prob)[: -(-len(block) // (end - step))]  # noqa: B023
        for j in chosen:
            ids[j] = seen[j].token
    policy = make_policy("prophet", answer_start=answer, **THRESHOLDS)
    assert_fills(ids, denoise, xt, masked, policy, steps=steps, block_length=block_length, nfe=nfe)
    assert early or answer in (29, 400)  # the case is not empty


def test_prophet_with_thresholds_out_of_reach_is_the_quota(context_denoiser):
    xt, masked = one_row(31)
    denoise = context_denoiser(VOCAB)
    far = make_policy("prophet", early=math.inf, middle=math.inf, late=math.inf)
    options = dict(mask_id=MASK, steps=9, temperature=0.0)
    plain = fill(denoise, xt, masked, policy="confidence", **options)
    assert torch.equal(fill(denoise, xt, masked, policy=far, **options).xt, plain.xt)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 300), name=st.sampled_from(["threshold", "factor", "entropy_budget", "klass", "ahd"]))
@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_ends_of_the_parameters_terminate(length, name, amount):
    field = {"factor": "factor", "entropy_budget": "gamma"}.get(name, "threshold")
    xt, masked = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None] > 0
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn(1, length, VOCAB, generator=generator)
    filled = fill(lambda x: logits, xt, masked, mask_id=MASK, policy=make_policy(name, **{field: amount}))
    assert not (filled.xt == MASK).any()
    assert 1 <= int(filled.nfe) <= length - 1
