# SPDX-License-Identifier: Apache-2.0
"""Policies that take tokens back: Saber, ReMDM, P2, WINO, against straight lines over one row and one block."""

import math
from fractions import Fraction

import pytest
import torch
from straight_line import MASK, VOCAB, assert_fills, best, one_row, philox_word, predict, start, uniform

from diffullama_ext.sampling import fill, make_policy

SEED, SAMPLE = 2**41 + 9, 3
KEYED = dict(seed=SEED, sample_index=torch.tensor([SAMPLE]))
LENGTH = 33


@pytest.fixture
def case(context_denoiser):
    """A denoiser, a row, its ids with masks and its maskable positions."""
    xt, masked = one_row(LENGTH, 0.9)
    return context_denoiser(VOCAB, sharpness=1.2), xt, masked, *start(xt, masked)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_saber(case, n):
    """The loop of the released code; two of its steps in words: see the docstring of the policy."""
    denoise, xt, masked, ids, everything = case
    done, final, last, nfe, taken_back = set(), {}, dict.fromkeys(everything, 0.0), 0, 0
    while len(done) < len(everything):
        nfe += 1
        seen = predict(denoise, ids)
        c = {j: seen[j].prob for j in everything}
        delta = {j: c[j] - last[j] for j in everything}
        last = c
        threshold = sum(final.values()) / len(final) if final else 1.0
        waiting = [j for j in everything if j not in done]
        accepted = [j for j in waiting if c[j] > threshold]
        if len(accepted) < n:
            accepted = best(waiting, lambda j: c[j])[:n]  # noqa: B023
        for j in accepted:
            ids[j] = seen[j].token
            final[j] = c[j]
            done.add(j)
        if len(done) == len(everything):
            break
        k = max(n, len(accepted))
        r = min(max(n // 2, math.ceil(k / 8)), k - 1)
        for j in best(done, lambda j: -delta[j])[:r]:  # noqa: B023
            ids[j] = MASK
            done.remove(j)
            taken_back += 1
    assert taken_back > 0 or n == 1
    assert_fills(ids, denoise, xt, masked, make_policy("saber", n=n), nfe=nfe)


@pytest.mark.parametrize("variant", ["cap", "rescale", "conf"])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("steps", [1, 8, 40])
def test_remdm(case, variant, eta, steps):
    denoise, xt, masked, ids, everything = case
    committed, nfe, taken_back = {}, 0, 0
    for step in range(steps):
        left = [j for j in everything if ids[j] == MASK]
        visible = [j for j in everything if ids[j] != MASK]
        if not left:
            break
        nfe += 1
        alpha_t, alpha_s = Fraction(step, steps), Fraction(step + 1, steps)
        sigma_max = float(min(1, (1 - alpha_s) / alpha_t)) if alpha_t else 1.0
        if variant == "conf":
            weights = {j: math.exp(-committed[j]) for j in visible}
            sigma = {j: weights[j] / sum(weights.values()) * sigma_max for j in visible}
            masked_sigma = 0.0
        else:
            masked_sigma = min(eta, sigma_max) if variant == "cap" else eta * sigma_max
            sigma = dict.fromkeys(visible, masked_sigma)
        reveal = (float(alpha_s) - (1 - masked_sigma) * float(alpha_t)) / (1 - float(alpha_t))
        words = {j: philox_word(SEED, SAMPLE, j, step) for j in left}
        chosen = [j for j in left if words[j] < reveal * 2**32] or [min(left, key=lambda j: words[j])]
        back = [j for j in visible if step + 1 < steps and uniform(SEED, SAMPLE, j, step) < sigma[j]]
        seen = predict(denoise, ids)
        for j in chosen:
            ids[j], committed[j] = seen[j].token, seen[j].prob
        for j in back:
            ids[j] = MASK
        taken_back += len(back)
    if steps > 1 and (eta > 0 or variant == "conf"):
        assert taken_back > 0
    assert_fills(
        ids, denoise, xt, masked, make_policy("remdm", variant=variant, eta=eta), steps=steps, nfe=nfe, **KEYED
    )


@pytest.mark.parametrize("variant", ["cap", "rescale", "conf"])
def test_remdm_keeps_the_marginals(variant):
    """After each step the expected share of masks is 1 - alpha_s, however much is masked again; 5 deviations."""
    length, steps, back = 20_001, 10, 0
    xt, masked = one_row(length)
    logits = torch.zeros(1, length, 2)

    def watch(state, stats, decision):
        expected = (length - 1) * (1 - (state.step + 1) / steps)
        assert abs(int(state.masked.sum()) - expected) <= 5 * math.sqrt(length)
        nonlocal back
        back += int(decision.remask.sum())
        assert 0 < state.step < steps - 1 or not decision.remask.any()

    policy = make_policy("remdm", variant=variant, eta=0.3)
    fill(lambda x: logits, xt, masked, mask_id=1, policy=policy, steps=steps, seed=5, on_step=watch)
    assert back > (2 if variant == "conf" else 5000)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 6, 20, 45])
def test_p2(case, eta, steps):
    denoise, xt, masked, ids, everything = case
    nfe, taken_back = 0, 0
    for i in range(1, steps + 1):
        if not any(ids[j] == MASK for j in everything):
            break
        nfe += 1
        seen = predict(denoise, ids)
        score = {}
        for j in everything:
            if ids[j] == MASK:
                score[j] = math.log(seen[j].prob)
            else:
                score[j] = eta * math.log(seen[j].p[ids[j]])
        n_masked = math.floor((1 - Fraction(i, steps)) * len(everything))
        worst = best(everything, lambda j: -score[j])[:n_masked]  # noqa: B023
        for j in everything:
            if j in worst:
                taken_back += ids[j] != MASK
                ids[j] = MASK
            elif ids[j] == MASK:
                ids[j] = seen[j].token
    assert (taken_back > 0) == (steps > 1 and eta > 0)
    assert_fills(ids, denoise, xt, masked, make_policy("p2", eta=eta), steps=steps, nfe=nfe)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("verify", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("bounds", [(5, 20), (1, 2)])
def test_wino(case, threshold, verify, bounds):
    denoise, xt, masked, ids, everything = case
    last, nfe, taken_back = 0, 0, 0
    while any(ids[j] == MASK for j in everything):
        nfe += 1
        seen, shadow = predict(denoise, ids), predict(denoise.leave_one_out, ids)
        left = [j for j in everything if ids[j] == MASK]
        most = min(max(int(0.7 * len(left)), bounds[0]), bounds[1])
        ordered = best(left, lambda j: seen[j].prob)  # noqa: B023
        accepted = [j for j in ordered if seen[j].prob > threshold][:most] or ordered[:1]
        doubted = [j for j in everything if ids[j] != MASK and shadow[j].p[ids[j]] < verify]
        back = best(doubted, lambda j: -shadow[j].p[ids[j]])[: max(last - 1, 0)]  # noqa: B023
        for j in accepted:
            ids[j] = seen[j].token
        for j in back:
            ids[j] = MASK
        last, taken_back = len(accepted), taken_back + len(back)
    if verify == 0.9 and threshold < 0.9:
        assert taken_back > 0
    policy = make_policy(
        "wino", threshold=threshold, verify=verify, accept_at_least=bounds[0], accept_at_most=bounds[1]
    )
    assert_fills(ids, denoise, xt, masked, policy, nfe=nfe)


def test_verification_needs_a_model_that_does_not_look(case):
    denoise, xt, masked, *_ = case
    with pytest.raises(ValueError, match=r"needs a denoiser with leave_one_out\(xt\), got <lambda>"):
        fill(lambda x: denoise(x), xt, masked, mask_id=MASK, policy="wino")


@pytest.mark.parametrize("name", ["saber", "remdm", "p2", "wino"])
@pytest.mark.parametrize(("steps", "block_length"), [(8, 4), (12, 7), (60, 6), (None, 5), (7, None)])
def test_a_schedule_is_kept_whatever_is_taken_back(context_denoiser, name, steps, block_length):
    """Few steps, blocks, several rows at once, temperature 1: every row ends in its steps, block after block."""
    rows = [one_row(30, 0.9, seed=seed) for seed in range(4)]
    xt, masked = (torch.cat(part) for part in zip(*rows, strict=True))
    denoise, back = context_denoiser(VOCAB, sharpness=1.2), 0
    order = []

    def watch(state, stats, decision):
        nonlocal back
        back += int(decision.remask.sum())
        order.append(state.current)

    parameters = {"remdm": dict(eta=0.5), "wino": dict(threshold=0.2)}.get(name, {})
    options = dict(mask_id=MASK, policy=make_policy(name, **parameters), steps=steps, block_length=block_length)
    filled = fill(denoise, xt, masked, on_step=watch, **options)
    assert not (filled.xt[masked] == MASK).any()
    assert torch.equal(filled.xt[~masked], xt[~masked])
    assert (filled.nfe <= (masked.sum(1) if steps is None else steps)).all()
    assert (torch.stack(order).diff(dim=0) >= 0).all()
    assert back > 0 or (steps, block_length) == (8, 4)  # there a block has one step or two
