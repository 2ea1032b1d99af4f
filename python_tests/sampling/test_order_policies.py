# SPDX-License-Identifier: Apache-2.0
"""Which position first: margin, entropy, Gumbel noise, and the random orders, against straight lines over one row."""

import math

import pytest
import torch
from straight_line import MASK, TAG_CHOICE, VOCAB, assert_fills, best, one_row, philox_word, predict, start, uniform

from diffullama_ext import schedules
from diffullama_ext.sampling import fill, make_policy

SEED, SAMPLE = 2**40 + 3, 6
KEYED = dict(seed=SEED, sample_index=torch.tensor([SAMPLE]))


def by_quota(denoise, ids, steps, key):
    """key(position, prediction, step): what is committed first."""
    for step in range(steps):
        left = [j for j in range(len(ids)) if ids[j] == MASK]
        seen = predict(denoise, ids)
        quota = -(-len(left) // (steps - step))
        for j in best(left, lambda j: key(j, seen[j], step))[:quota]:  # noqa: B023
            ids[j] = seen[j].token
    return ids


@pytest.mark.parametrize("steps", [1, 5, 24])
@pytest.mark.parametrize(
    ("name", "score"),
    [("confidence", lambda p: p.prob), ("margin", lambda p: p.margin), ("entropy", lambda p: -p.entropy)],
)
@pytest.mark.parametrize("noise", [0.0, 0.1, 2.0])
def test_quota_is_dreams_order(context_denoiser, name, score, noise, steps):
    """The best first; with noise, Gumbel-top-k over score / noise, which is drawing without replacement."""
    xt, masked = one_row(25, 0.9)
    denoise = context_denoiser(VOCAB)
    ids, _ = start(xt, masked)

    def key(j, p, step):
        gumbel = -math.log(-math.log(uniform(SEED, SAMPLE, j, step)))
        return score(p) / noise + gumbel if noise else score(p)

    expected = by_quota(denoise, ids, steps, key)
    assert_fills(expected, denoise, xt, masked, make_policy(name, noise=noise), steps=steps, **KEYED)


def test_noise_draws_by_the_softmax_of_the_scores():
    """The first commit of many samples: frequencies are softmax(score / noise), within 4 standard deviations."""
    n, noise = 4000, 0.5
    logits = torch.zeros(1, 5, 3)
    logits[0, :4, 1] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    xt, masked = torch.zeros(n, 5, dtype=torch.int64), (torch.arange(5) > 0).expand(n, 5)
    first = torch.zeros(4)

    def watch(state, stats, decision):
        if state.step == 0:
            first.copy_(decision.commit.sum(0)[1:])

    policy = make_policy("confidence", noise=noise)
    fill(lambda x: logits.expand(n, -1, -1), xt, masked, mask_id=2, policy=policy, temperature=0.0, on_step=watch)
    best_prob = logits[0, :4, :2].softmax(1).amax(1)
    expected = (best_prob / noise).softmax(0)
    assert ((first / n - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert expected.max() - expected.min() > 0.1


@pytest.mark.parametrize("steps", [None, 4, 40])
def test_first_hitting_is_a_uniform_order(context_denoiser, steps):
    xt, masked = one_row(25, 0.9)
    denoise = context_denoiser(VOCAB)
    ids, maskable = start(xt, masked)
    n_steps = len(maskable) if steps is None else steps
    words = {}

    def key(j, p, step):
        return words.setdefault((j, step), philox_word(SEED, SAMPLE, j, step, TAG_CHOICE))

    expected = by_quota(denoise, ids, n_steps, key)
    nfe = min(n_steps, len(maskable))
    assert_fills(expected, denoise, xt, masked, "first_hitting", steps=steps, nfe=nfe, **KEYED)


@pytest.mark.parametrize("steps", [1, 6, 60])
def test_ancestral_is_mdlms_sampler(context_denoiser, steps):
    """Each for itself, from t = 1 - step / steps to s: revealed with probability (t - s) / t. Some steps wait."""
    xt, masked = one_row(16, 0.9)
    denoise = context_denoiser(VOCAB)
    ids, _ = start(xt, masked)
    idle = 0
    for step in range(steps):
        left = [j for j in range(16) if ids[j] == MASK]
        if not left:
            break
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        reveal = [j for j in left if step + 1 == steps or uniform(SEED, SAMPLE, j, step) < (t - s) / t]
        idle += not reveal
        seen = predict(denoise, ids)
        for j in reveal:
            ids[j] = seen[j].token
    assert_fills(ids, denoise, xt, masked, "ancestral", steps=steps, **KEYED)
    assert steps < 60 or idle > 5


def dreams_rate(step, steps):
    t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    return 1 - t[step + 1] / t[step]


def test_our_quota_is_dreams_rounded_up():
    """Dream takes int(m (1 - s / t)), all in the last step: 8 masks in 16 steps wait for the end; ours do not."""
    for n, steps in ((8, 16), (24, 8), (256, 64), (7, 3)):
        left = n
        for step in range(steps):
            exact = left if step + 1 == steps else left * float(dreams_rate(step, steps))
            ours = int(schedules.commit_quota(torch.tensor(left), steps - step))
            assert ours >= int(exact)
            assert ours <= math.ceil(exact / 0.95)
            left -= ours
        assert left == 0
