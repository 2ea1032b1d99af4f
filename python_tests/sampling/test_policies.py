# SPDX-License-Identifier: Apache-2.0
"""Each policy against its published rule, written again as a straight line over one row and plain Python numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from straight_line import MASK, VOCAB, one_row, philox_word

from diffullama_ext import schedules, token_stats
from diffullama_ext.sampling import (
    POLICIES,
    ConfidencePolicy,
    Decision,
    Policy,
    RandomPolicy,
    ThresholdPolicy,
    fill,
    make_policy,
)


def greedy_row(logits):
    """Token and probability of the largest logit but the mask's, in float64."""
    x = [-math.inf if v == MASK else logits[v] for v in range(len(logits))]
    token = max(range(len(x)), key=lambda v: x[v])
    return token, 1.0 / sum(math.exp(value - x[token]) for value in x)


def predictions(denoise, ids, masks, shift=True):
    logits = denoise(torch.tensor([ids]))[0].double().tolist()
    return {j: greedy_row(logits[j - shift]) for j in masks}


def llada(denoise, ids, masks, *, steps, block_length):
    """LLaDA's generate with low-confidence remasking at temperature 0: equal blocks, quotas base and base + 1."""
    ids, n_blocks = list(ids), len(masks) // block_length
    for k in range(n_blocks):
        block = masks[k * block_length : (k + 1) * block_length]
        per_block = steps // n_blocks
        base, remainder = divmod(len(block), per_block)
        for step in range(per_block):
            left = [j for j in block if ids[j] == MASK]
            predicted = predictions(denoise, ids, left)
            left.sort(key=lambda j: -predicted[j][1])
            for j in left[: base + (step < remainder)]:
                ids[j] = predicted[j][0]
    return ids


@pytest.mark.parametrize(
    ("n_masked", "steps", "block_length"),
    [(24, 24, 24), (24, 7, 24), (24, 1, 24), (24, 40, 24), (24, 8, 6), (24, 12, 8), (24, 4, 6), (20, 20, 1)],
)
def test_confidence_is_lladas_loop(context_denoiser, n_masked, steps, block_length):
    xt, masked = one_row(n_masked + 1)
    denoise = context_denoiser(VOCAB)
    ids = [MASK if m else i for i, m in zip(xt[0].tolist(), masked[0].tolist(), strict=True)]
    expected = llada(denoise, ids, list(range(1, n_masked + 1)), steps=steps, block_length=block_length)
    filled = fill(
        denoise, xt, masked, mask_id=MASK, policy="confidence", steps=steps, block_length=block_length, temperature=0.0
    )
    assert filled.xt[0].tolist() == expected


@settings(max_examples=25, deadline=None)
@given(n_masked=st.integers(1, 60), steps=st.integers(1, 80))
def test_confidence_quotas_are_exact(n_masked, steps):
    """n // steps or one more, the larger ones first: the numbers of LLaDA, and of schedules.commit_quota."""
    xt, masked = one_row(n_masked + 1)
    counts = []
    fill(
        lambda x: torch.zeros(1, n_masked + 1, VOCAB),
        xt,
        masked,
        mask_id=MASK,
        policy="confidence",
        steps=steps,
        on_step=lambda state, stats, decision: counts.append(int(decision.commit.sum())),
    )
    base, remainder = divmod(n_masked, steps)
    assert counts == [base + (i < remainder) for i in range(min(steps, n_masked))]
    left = n_masked
    for step, count in enumerate(counts):
        assert count == int(schedules.commit_quota(torch.tensor(left), steps - step))
        left -= count


@pytest.mark.parametrize("confidence", ["prob", "sample_prob"])
def test_confidence_of_the_model_or_of_the_draw(context_denoiser, confidence):
    """With a temperature the two orders differ; draws are those of token_stats at the key (sample, position)."""
    xt, masked = one_row(30)
    denoise, sample, steps, seed = context_denoiser(VOCAB), 3, 5, 9
    ids = [MASK if m else i for i, m in zip(xt[0].tolist(), masked[0].tolist(), strict=True)]
    for step in range(steps):
        left = [j for j in range(30) if ids[j] == MASK]
        logits = denoise(torch.tensor([ids]))[0]
        score, token = {}, {}
        for j in left:
            draw = dict(temperature=0.7, top_k=8, top_p=0.9, forbid=MASK, seed=seed, step=step)
            stats = token_stats(logits[j - 1 : j], row_index=torch.tensor([sample * 2**32 + j]), **draw)
            score[j], token[j] = float(getattr(stats, confidence)), int(stats.token)
        left.sort(key=lambda j: -score[j])
        for j in left[: -(-len(left) // (steps - step))]:
            ids[j] = token[j]
    filled = fill(
        denoise,
        xt,
        masked,
        mask_id=MASK,
        policy=ConfidencePolicy(confidence),
        steps=steps,
        temperature=0.7,
        top_k=8,
        top_p=0.9,
        seed=seed,
        sample_index=torch.tensor([sample]),
    )
    assert filled.xt[0].tolist() == ids


@pytest.mark.parametrize("policy", [ConfidencePolicy, ThresholdPolicy])
def test_a_greedy_draw_has_the_models_confidence(context_denoiser, policy):
    xt, masked = one_row(30)
    runs = [
        fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=policy(confidence=c), steps=9, temperature=0.0)
        for c in ("prob", "sample_prob")
    ]
    assert torch.equal(runs[0].xt, runs[1].xt)
    assert torch.equal(runs[0].nfe, runs[1].nfe)


# --- threshold -------------------------------------------------------------------------------------------------------


def fast_dllm(denoise, ids, *, threshold, quota=lambda left, step: 1):
    """Commit all of at least the threshold and the most confident; with a quota, no fewer than that. -> ids, nfe"""
    ids, nfe = list(ids), 0
    while MASK in ids:
        left = [j for j in range(len(ids)) if ids[j] == MASK]
        predicted = predictions(denoise, ids, left)
        left.sort(key=lambda j: -predicted[j][1])
        for rank, j in enumerate(left):
            if predicted[j][1] >= threshold or rank < quota(len(left), nfe):
                ids[j] = predicted[j][0]
        nfe += 1
    return ids, nfe


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9, 1.0, 1.5, math.inf])
@pytest.mark.parametrize("steps", [None, 6])
def test_threshold_is_fast_dllms_rule(context_denoiser, threshold, steps):
    xt, masked = one_row(33, 0.9)
    denoise = context_denoiser(VOCAB, sharpness=0.7)
    ids = [MASK if m else i for i, m in zip(xt[0].tolist(), masked[0].tolist(), strict=True)]
    quota = (lambda left, step: 1) if steps is None else (lambda left, step: -(-left // (steps - step)))
    expected, nfe = fast_dllm(denoise, ids, threshold=threshold, quota=quota)
    policy = ThresholdPolicy(threshold)
    filled = fill(denoise, xt, masked, mask_id=MASK, policy=policy, steps=steps, temperature=0.0)
    assert filled.xt[0].tolist() == expected
    assert filled.nfe.tolist() == [nfe]
    assert steps is None or nfe <= steps


def test_threshold_at_its_ends(context_denoiser):
    """Above 1: one token at a time, greedy (quota 1). 0: everything in one step."""
    xt, masked = one_row(20)
    options = dict(mask_id=MASK, temperature=0.0)
    denoise = context_denoiser(VOCAB, sharpness=3.0)
    one_by_one = fill(denoise, xt, masked, policy=ConfidencePolicy(), steps=int(masked.sum()), **options)
    above = fill(denoise, xt, masked, policy=ThresholdPolicy(1.0001), **options)
    assert torch.equal(above.xt, one_by_one.xt)
    assert above.nfe.tolist() == one_by_one.nfe.tolist() == [19]
    at_once = fill(denoise, xt, masked, policy=ThresholdPolicy(0.0), **options)
    assert at_once.nfe.tolist() == [1]
    assert torch.equal(at_once.xt, fill(denoise, xt, masked, policy="confidence", steps=1, **options).xt)


def test_threshold_rows_end_on_their_own(context_denoiser):
    xt, masked = one_row(20)
    xt, masked = xt.repeat(3, 1), masked.repeat(3, 1)
    masked[1] = False
    masked[2, 4:] = False
    filled = fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=ThresholdPolicy(2.0), temperature=0.0)
    assert filled.nfe.tolist() == [19, 0, 3]


# --- random ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 12, 60])
def test_random_is_algorithm_2(context_denoiser, steps):
    """Reveal with probability (alpha_s - alpha_t) / (1 - alpha_t), alpha = 1 - t; where none is, the nearest one."""
    xt, masked = one_row(20, 0.9)
    denoise, sample, seed = context_denoiser(VOCAB), 5, 2**40 + 1
    ids = [MASK if m else i for i, m in zip(xt[0].tolist(), masked[0].tolist(), strict=True)]
    for step in range(steps):
        left = [j for j in range(20) if ids[j] == MASK]
        if not left:
            break
        alpha_t, alpha_s = step / steps, (step + 1) / steps
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        words = {j: philox_word(seed, sample, j, step) for j in left}
        predicted = predictions(denoise, ids, left)
        chosen = [j for j in left if words[j] < reveal * 2**32] or [min(left, key=lambda j: words[j])]
        for j in chosen:
            ids[j] = predicted[j][0]
    filled = fill(
        denoise,
        xt,
        masked,
        mask_id=MASK,
        policy="random",
        steps=steps,
        temperature=0.0,
        seed=seed,
        sample_index=torch.tensor([sample]),
    )
    assert filled.xt[0].tolist() == ids


@pytest.mark.parametrize("steps", [4, 10])
def test_random_reveals_at_the_right_rate(steps):
    """Each of steps, steps - 1, ... 1 reveals its share of what is left, wherever it is; 4 standard deviations."""
    xt, masked = one_row(20_001)
    denoise = torch.zeros(1, 20_001, 2)
    left, order = 20_000, torch.full((20_001,), -1)

    def watch(state, stats, decision):
        nonlocal left
        p, count = 1 / (steps - state.step), int(decision.commit.sum())
        assert abs(count - p * left) <= 4 * math.sqrt(left * p * (1 - p))
        left -= count
        order[decision.commit[0]] = state.step

    fill(lambda x: denoise, xt, masked, mask_id=1, policy="random", steps=steps, seed=17, on_step=watch)
    assert left == 0
    revealed = order[1:].double()
    expected = (steps - 1) / 2  # uniform over the steps
    deviation = math.sqrt((steps**2 - 1) / 12)
    for part in revealed.view(8, -1):
        assert abs(part.mean() - expected) < 4 * deviation / math.sqrt(len(part))
    centred = revealed - revealed.mean()
    for lag in (1, 2, 3, 4, 5, 8):
        correlation = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
        assert abs(correlation) < 4 / math.sqrt(20_000)


def test_random_ignores_the_logits(context_denoiser):
    """The order of revealing depends on the seed alone."""
    xt, masked = one_row(40)
    orders = []
    for sharpness in (0.1, 3.0):
        steps_of = torch.full((40,), -1)

        def watch(state, stats, decision, steps_of=steps_of):
            steps_of[decision.commit[0]] = state.step

        fill(context_denoiser(VOCAB, sharpness), xt, masked, mask_id=MASK, policy="random", steps=8, on_step=watch)
        orders.append(steps_of)
    assert torch.equal(*orders)


# --- a policy of one's own -------------------------------------------------------------------------------------------


class CommitAllRemaskWorst(Policy):
    """Commits everything, takes the least probable of its tokens back, reads visible positions and keeps a memory."""

    def rows(self, state):
        return state.maskable

    def decide(self, stats, state):
        state.memory["steps"] = state.memory.get("steps", torch.zeros(())) + 1
        keep = state.maskable.sum(1) - (state.steps_left - 1)
        p = torch.where(state.masked, stats.prob, stats.current_prob)
        rank = torch.where(state.maskable, p, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
        return Decision(state.masked, remask=rank >= keep[:, None])


def test_a_revising_policy(context_denoiser):
    xt, masked = one_row(25, 0.6)
    left, memory = [], {}

    def watch(state, stats, decision):
        left.append(int(state.masked.sum()))
        assert (state.xt[state.masked] == MASK).all()
        assert not (state.masked & ~masked).any()  # remasking everything else was asked for, and refused
        assert (stats.current_prob[masked] >= 0).all()
        memory.update(state.memory)

    filled = fill(
        context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=CommitAllRemaskWorst(), steps=6, on_step=watch
    )
    assert left == [5, 4, 3, 2, 1, 0]
    assert filled.nfe.tolist() == [6]
    assert int(memory["steps"]) == 6
    assert torch.equal(filled.xt[~masked], xt[~masked])


class CommitEverywhere(Policy):
    """Any object with the methods is a policy; what it commits over fixed positions is not written."""

    adaptive = True

    def rows(self, state):
        return torch.ones_like(state.masked) & (torch.arange(state.masked.shape[1]) > 0)

    def decide(self, stats, state):
        return Decision(torch.ones_like(state.masked))


def test_fixed_positions_are_out_of_a_policys_reach(context_denoiser):
    xt, masked = one_row(25, 0.5)
    filled = fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=CommitEverywhere())
    assert torch.equal(filled.xt[~masked], xt[~masked])
    assert filled.nfe.tolist() == [1]


class CommitMasked(Policy):
    def decide(self, stats, state):
        return Decision(state.masked)


def test_a_position_without_statistics_is_not_written(context_denoiser):
    """It has no token: only the current block, which rows() asks for, can be committed."""
    xt, masked = one_row(25)
    filled = fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=CommitMasked(), block_length=8)
    assert filled.nfe.tolist() == [3]
    assert (filled.xt >= 0).all()


def test_policies_by_name():
    assert make_policy("random") == RandomPolicy()
    assert make_policy("confidence", confidence="sample_prob") == ConfidencePolicy("sample_prob")
    assert make_policy("threshold", threshold=0.5) == ThresholdPolicy(0.5)
    assert all(isinstance(make_policy(name), Policy) for name in POLICIES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_policy("best"), r"policy must be one of '.*'threshold'.*, got 'best'"),
        (
            lambda: make_policy("threshold", tau=0.5),
            r"policy 'threshold' has the parameters \['threshold', 'confidence'\], got 'tau'",
        ),
        (lambda: make_policy("random", threshold=0.5), r"policy 'random' has the parameters \[\], got 'threshold'"),
        (lambda: ThresholdPolicy(-0.1), r"threshold must be in \[0, inf\], got -0.1"),
        (lambda: ThresholdPolicy(math.nan), r"threshold must be in \[0, inf\], got nan"),
        (lambda: ThresholdPolicy(confidence="p1"), r"confidence must be one of 'prob', 'sample_prob', got 'p1'"),
        (lambda: ConfidencePolicy("entropy"), r"confidence must be one of 'prob', 'sample_prob', got 'entropy'"),
    ],
    ids=["unknown", "parameter", "no-parameters", "negative", "nan", "p1", "entropy"],
)
def test_rejects_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class TakeBackEverything(Policy):
    """Commits the current block and wants everything masked again, as often as it may."""

    may_wait = True

    def decide(self, stats, state):
        return Decision(state.active, remask=torch.ones_like(state.masked))


def test_what_may_be_taken_back(context_denoiser):
    """Tokens of the current block, and none in its last step: an earlier block or a given token never."""
    xt, masked = one_row(25)
    left = []
    filled = fill(
        context_denoiser(VOCAB),
        xt,
        masked,
        mask_id=MASK,
        policy=TakeBackEverything(),
        steps=8,
        block_length=12,
        on_step=lambda state, stats, decision: left.append((int(state.current), int(state.masked.sum()))),
    )
    assert left == [(0, 24)] * 3 + [(0, 12)] + [(1, 12)] * 3 + [(1, 0)]
    assert not (filled.xt[masked] == MASK).any()
