# SPDX-License-Identifier: Apache-2.0
"""What changes the logits, ends a row early, or asks less often: constraints, guidance, eos, done_every."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from straight_line import MASK, VOCAB, one_row, predict, start

from diffullama_ext.sampling import Forbidden, Forced, Guided, fill, make_policy
from diffullama_ext.sampling.denoisers import FunctionDenoiser

EOS = 4


def batch(n, length=30, rate=0.9):
    rows = [one_row(length, rate, seed=seed) for seed in range(n)]
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


@pytest.mark.parametrize("policy", ["random", "confidence", "threshold", "p2", "ahd"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_positions_take_their_tokens(context_denoiser, policy, temperature):
    xt, masked = batch(3)
    tokens = torch.full_like(xt, -1)
    tokens[0, 5], tokens[1, 7], tokens[2, 20], tokens[2, 21] = 3, 0, 9, 1
    masked[0, 5] = masked[1, 7] = masked[2, 20] = masked[2, 21] = True
    options = dict(mask_id=MASK, policy=policy, steps=9, temperature=temperature)
    denoise = context_denoiser(VOCAB)
    free = fill(denoise, xt, masked, **options).xt
    forced = fill(denoise, xt, masked, logits_hooks=[Forced(tokens)], **options).xt
    assert torch.equal(forced[tokens >= 0], tokens[tokens >= 0])
    assert not torch.equal(free[tokens >= 0], tokens[tokens >= 0])
    nothing = Forced(torch.full_like(xt, -1))
    assert torch.equal(fill(denoise, xt, masked, logits_hooks=[nothing], **options).xt, free)


def test_forbidden_tokens_are_not_drawn(context_denoiser):
    xt, masked = batch(3)
    denoise = context_denoiser(VOCAB)
    seen = []

    def keep(scored, state):
        seen.append(scored.logits.clone())
        return scored.logits

    hooks = [keep, Forbidden([2, 7]), keep]
    filled = fill(denoise, xt, masked, mask_id=MASK, policy="random", steps=6, logits_hooks=hooks)
    assert not torch.isin(filled.xt[masked], torch.tensor([2, 7])).any()
    assert torch.isin(
        fill(denoise, xt, masked, mask_id=MASK, policy="random", steps=6).xt[masked], torch.tensor([2])
    ).any()
    assert torch.equal(seen[0][:, :2], seen[1][:, :2])  # hooks in order, the others' logits as they were
    assert (seen[1][:, [2, 7]] == -torch.inf).all()


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("shift", [False, True])
def test_guidance_is_lladas_formula(context_denoiser, weight, shift):
    """l_u + (w + 1) (l_c - l_u), l_u with the prompt masked, one position a step."""
    xt, masked = one_row(20, 0.7)
    denoise = context_denoiser(VOCAB)
    ids, maskable = start(xt, masked)
    while MASK in (ids[j] for j in maskable):
        hidden = [i if j in maskable else MASK for j, i in enumerate(ids)]
        conditional, unconditional = denoise(torch.tensor([ids])), denoise(torch.tensor([hidden]))
        guided = unconditional + (weight + 1) * (conditional - unconditional)
        seen = predict(lambda x: guided, ids, shift)  # noqa: B023
        j = max((j for j in maskable if ids[j] == MASK), key=lambda j: seen[j].prob)
        ids[j] = seen[j].token
    filled = fill(
        Guided(FunctionDenoiser(denoise, shift), weight), xt, masked, mask_id=MASK, shift=shift, temperature=0.0
    )
    assert filled.xt[0].tolist() == ids
    assert filled.nfe.tolist() == [2 * len(maskable)]
    plain = fill(denoise, xt, masked, mask_id=MASK, shift=shift, temperature=0.0)
    assert torch.equal(plain.xt, filled.xt) == (weight == 0.0)


def test_the_negative_branch_is_any_ids(context_denoiser):
    """Here: the token before each mask hidden. The branch sees the state of the step, and does not change it."""
    xt, masked = one_row(20, 0.7)
    denoise, calls = context_denoiser(VOCAB), []

    def negative(state):
        calls.append(state.xt)
        return torch.where(state.masked.roll(-1, 1), MASK, state.xt)

    rows = FunctionDenoiser(denoise, True)
    filled = fill(Guided(rows, 1.0, negative), xt, masked, mask_id=MASK, steps=5, temperature=0.0)
    assert len(calls) == 5
    assert not (filled.xt[masked] == MASK).any()
    assert torch.equal(filled.xt[~masked], xt[~masked])
    with pytest.raises(ValueError, match=r"negative\(state\) must be int64\[1, 20\], got"):
        fill(Guided(rows, 1.0, lambda state: state.xt[:, 1:]), xt, masked, mask_id=MASK)
    with pytest.raises(ValueError, match=r"weight must be in \[0, inf\], got -1"):
        Guided(rows, -1)


def test_guidance_keeps_what_the_model_excludes(context_denoiser):
    xt, masked = one_row(20)

    def denoise(x):
        return context_denoiser(VOCAB)(x).index_fill(2, torch.tensor([3]), -torch.inf)

    filled = fill(Guided(FunctionDenoiser(denoise, True), 2.0), xt, masked, mask_id=MASK, steps=5)
    assert not (filled.xt[masked] == 3).any()


# --- the end of the text ---------------------------------------------------------------------------------------------


def ended(row, masked):
    """Behind the first EOS that may be written all is EOS; None without one."""
    places = [j for j in range(len(row)) if masked[j] and row[j] == EOS]
    return places and all(row[j] == EOS for j in range(places[0], len(row)) if masked[j])


@pytest.mark.parametrize("policy", ["random", "confidence", "threshold", "ahd", "prophet"])
@pytest.mark.parametrize("block_length", [None, 5])
def test_eos_ends_a_row(context_denoiser, policy, block_length):
    """Text before it is what it would have been; rows with one are through earlier."""
    xt, masked = batch(6, 40, 1.0)
    xt[:, :3], masked[:, :3] = EOS, False  # in a prompt it ends nothing
    denoise = context_denoiser(VOCAB)
    options = dict(mask_id=MASK, policy=policy, block_length=block_length, seed=2)
    plain, stopped = (fill(denoise, xt, masked, eos_id=eos_id, **options) for eos_id in (None, EOS))
    assert not (stopped.xt == MASK).any()
    some = 0
    for row, mask, before in zip(stopped.xt.tolist(), masked.tolist(), plain.xt.tolist(), strict=True):
        assert ended(row, mask) in ([], True)
        some += before != row
    assert some > 0
    assert (stopped.nfe <= plain.nfe).all()
    if block_length:
        assert (stopped.nfe < plain.nfe).any()


def test_an_eos_behind_masks_ends_nothing_yet(one_hot_denoiser):
    """Revealed first: the row goes on until nothing is masked before it; fixed text behind it stays."""
    target = torch.tensor([[1, 2, 3, EOS, 5, 6, 7, 8]])
    masked = torch.tensor([[False, True, True, True, True, True, False, True]])
    order = torch.tensor([0.0, 0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6])

    def denoise(xt):
        return one_hot_denoiser(target, VOCAB, True)(xt) * (0.05 + 0.05 * order.roll(-1)[None, :, None])

    left = []
    filled = fill(
        denoise,
        target,
        masked,
        mask_id=MASK,
        eos_id=EOS,
        temperature=0.0,
        on_step=lambda state, stats, decision: left.append(state.masked[0].nonzero().flatten().tolist()),
    )
    assert left == [[1, 2, 4, 5, 7], [1, 2, 4, 5], [1, 2, 4], [1, 2], [1], []]
    assert filled.xt.tolist() == [[1, 2, 3, EOS, EOS, EOS, 7, EOS]]


# --- how often a device is asked -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["threshold", "saber", "p2", "prophet", "random"]),
    done_every=st.integers(1, 40),
    eos_id=st.none() | st.just(EOS),
    steps=st.none() | st.integers(4, 50),
)
def test_asking_less_often_changes_nothing_but_the_forwards(context_denoiser, name, done_every, eos_id, steps):
    xt, masked = batch(3)
    denoise, calls = context_denoiser(VOCAB, sharpness=2.0), 0

    def counted(x):
        nonlocal calls
        calls += 1
        return denoise(x)

    policy = make_policy(name, threshold=0.4) if name == "threshold" else name
    options = dict(mask_id=MASK, policy=policy, steps=steps, eos_id=eos_id, seed=1)
    each = fill(denoise, xt, masked, done_every=1, **options)
    some = fill(counted, xt, masked, done_every=done_every, **options)
    assert torch.equal(some.xt, each.xt)
    assert torch.equal(some.nfe, each.nfe)
    assert each.nfe.max() <= calls <= max(int(each.nfe.max()) + done_every, int(masked.sum(1).max()))


def test_a_row_that_cannot_go_on_is_found_at_the_next_look(context_denoiser):
    xt, masked = batch(2)
    calls = 0

    def broken(x):
        nonlocal calls
        calls += 1
        logits = context_denoiser(VOCAB)(x)
        logits[1] = torch.nan
        return logits

    with pytest.raises(RuntimeError, match=r"no token can be drawn in rows \[1\]"):
        fill(broken, xt, masked, mask_id=MASK, policy="threshold", done_every=3)
    assert calls == 3
    with pytest.raises(ValueError, match=r"done_every must be in \[1, .*got 0"):
        fill(broken, xt, masked, mask_id=MASK, done_every=0)
