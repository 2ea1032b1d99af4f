# SPDX-License-Identifier: Apache-2.0
"""KLASS and AHD against straight lines over one row."""

import math

import pytest
import torch
from straight_line import MASK, VOCAB, assert_fills, best, one_row, predict, start

from diffullama_ext.sampling import fill, make_policy


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kl", [0.0, 0.01, 0.5, math.inf])
@pytest.mark.parametrize("history", [1, 2, 3])
def test_klass(context_denoiser, threshold, kl, history):
    xt, masked = one_row(40, 0.9)
    denoise = context_denoiser(VOCAB, sharpness=1.5)
    ids, _ = start(xt, masked)
    past, nfe, several = [], 0, 0
    while MASK in ids:
        nfe += 1
        seen = predict(denoise, ids)
        left = [j for j in range(len(ids)) if ids[j] == MASK]
        past.append(seen)
        recent = list(zip(past[-history:], past[-history - 1 :], strict=False)) if len(past) > history else []
        stable = [j for j in left if recent and all(new[j].kl(old[j]) < kl for new, old in recent)]
        sure = [j for j in stable if seen[j].prob >= threshold]
        several += len(sure) > 1
        for j in sure or best(left, lambda j: seen[j].prob)[:1]:  # noqa: B023
            ids[j] = seen[j].token
    policy = make_policy("klass", threshold=threshold, kl=kl, history=history)
    assert_fills(ids, denoise, xt, masked, policy, nfe=nfe)
    assert several or kl == 0.0 or (threshold, history) == (0.9, 3)


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.5, math.inf])
@pytest.mark.parametrize("history", [2, 4, 6])
@pytest.mark.parametrize("decay", [1.0, 0.2])
def test_ahd(context_denoiser, tolerance, history, decay):
    """The current block by threshold, later ones where the weighted divergence from the last steps is small."""
    xt, masked = one_row(41)
    denoise = context_denoiser(VOCAB, sharpness=1.5)
    ids, maskable = start(xt, masked)
    past, nfe, ahead_at_all = [], 0, 0
    weight = [math.exp(-decay * tau) for tau in range(1, history)]
    while MASK in ids:
        nfe += 1
        seen = predict(denoise, ids)
        left = [j for j in maskable if ids[j] == MASK]
        current = min(maskable.index(j) for j in left) // 10
        block = [j for j in left if maskable.index(j) // 10 == current]
        chosen = {j for j in block if seen[j].prob >= 0.9} | {best(block, lambda j: seen[j].prob)[0]}  # noqa: B023
        if len(past) >= history - 1:
            for j in set(left) - set(block):
                moved = sum(w * seen[j].kl(past[-tau][j]) for tau, w in enumerate(weight, start=1)) / sum(weight)
                if moved < tolerance:
                    chosen.add(j)
                    ahead_at_all += 1
        for j in chosen:
            ids[j] = seen[j].token
        past.append(seen)
    policy = make_policy("ahd", tolerance=tolerance, history=history, decay=decay)
    assert_fills(ids, denoise, xt, masked, policy, block_length=10, nfe=nfe)
    assert ahead_at_all or tolerance == 0.0


def test_ahd_without_blocks_is_the_threshold_rule(context_denoiser):
    xt, masked = one_row(40, 0.9)
    denoise = context_denoiser(VOCAB, sharpness=1.5)
    options = dict(mask_id=MASK, temperature=0.0)
    plain = fill(denoise, xt, masked, policy="threshold", **options)
    assert torch.equal(fill(denoise, xt, masked, policy=make_policy("ahd", tolerance=math.inf), **options).xt, plain.xt)


def test_a_token_the_model_excludes_is_no_divergence():
    """Logits of -inf: 0 log 0 is 0, so an unmoving distribution is stable, and all is committed after the history."""
    logits = torch.zeros(1, 9, 4)
    logits[:, :, 2] = -torch.inf
    xt, masked = torch.zeros(1, 9, dtype=torch.int64), torch.arange(9)[None] > 0
    policy = make_policy("klass", threshold=0.4, history=2)
    filled = fill(lambda x: logits, xt, masked, mask_id=3, policy=policy, temperature=0.0)
    assert filled.nfe.tolist() == [3]
