# SPDX-License-Identifier: Apache-2.0
"""The loop: what holds for every policy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffullama_ext.sampling import POLICIES, ConfidencePolicy, Decision, ThresholdPolicy, fill, make_policy
from diffullama_ext.sampling.denoisers import FunctionDenoiser
from diffullama_ext.sampling.policies import KLASSPolicy, ReMDMPolicy
from diffullama_ext.sampling.state import Scored, State
from diffullama_ext.sampling.statistics import PositionStats

VOCAB, MASK = 13, 12
EVERY_NAME = {name: make_policy(name) for name in POLICIES}
EVERY_POLICY = EVERY_NAME | {
    "confidence-draw": ConfidencePolicy("sample_prob"),
    "confidence-noise": ConfidencePolicy(noise=0.2),
    "threshold": ThresholdPolicy(0.4),
    "threshold-draw": ThresholdPolicy(0.4, "sample_prob"),
    "entropy_budget-1": make_policy("entropy_budget", gamma=1.0, order="entropy"),
    "prophet-answer": make_policy("prophet", answer_start=2, early=3.0, middle=2.0, late=1.0),
    "remdm-rescale": make_policy("remdm", variant="rescale", eta=0.5),
    "remdm-conf": make_policy("remdm", variant="conf"),
    "klass-soft": make_policy("klass", threshold=0.3, kl=1.0, history=1),
    "ahd-soft": make_policy("ahd", threshold=0.4, tolerance=1.0, history=3),
    "wino-soft": make_policy("wino", threshold=0.2, verify=0.3),
}
every_policy = pytest.mark.parametrize("policy", EVERY_POLICY.values(), ids=EVERY_POLICY.keys())
both_shifts = pytest.mark.parametrize("shift", [False, True], ids=["same-row", "shift"])


def random_batch(batch, length, rate, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xt = torch.randint(0, VOCAB, (batch, length), generator=generator)  # fixed text may hold the mask id
    masked = torch.rand(batch, length, generator=generator) < rate
    masked[:, 0] = False
    return xt, masked


@both_shifts
@every_policy
@pytest.mark.parametrize(("steps", "block_length"), [(1, None), (7, None), (100, None), (9, 5), (40, 1), (None, 6)])
def test_one_hot_denoiser_recovers_its_target(one_hot_denoiser, policy, shift, steps, block_length):
    target, masked = random_batch(3, 40, 0.7)
    target[target == MASK] = 0
    filled = fill(
        one_hot_denoiser(target, VOCAB, shift),
        torch.where(masked, -7, target),
        masked,
        mask_id=MASK,
        policy=policy,
        steps=steps,
        block_length=block_length,
        shift=shift,
    )
    assert torch.equal(filled.xt, target)


@every_policy
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_invariants(context_denoiser, policy, data):
    """Fixed positions never change, no mask remains, each step commits in every active row, steps are kept.

    Seen after each step: what was written is what the state holds, and nothing behind the current block is taken back.
    """
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    shift = data.draw(st.booleans())
    steps = data.draw(st.none() | st.integers(1, 30))
    xt, masked = random_batch(batch, length, data.draw(st.sampled_from([0.0, 0.3, 1.0])), seed=length)
    masked[:, 0] |= not shift
    block_length = None if steps is None else data.draw(st.integers(-(-length // steps), length))
    before = masked

    def watch(state, stats, decision):
        nonlocal before
        committed, remasked = decision.commit, torch.zeros_like(before)
        if decision.remask is not None:
            remasked = decision.remask
            assert not (remasked & ~state.in_block).any()
        assert not (committed & ~before).any()
        assert policy.may_wait or torch.equal(committed.any(1), before.any(1))
        assert torch.equal(state.masked, before & ~committed | remasked)
        assert torch.equal(state.xt[committed & ~remasked], stats.token[committed & ~remasked])
        assert (state.xt[state.masked] == MASK).all()
        before = state.masked

    filled = fill(
        context_denoiser(VOCAB),
        xt,
        masked,
        mask_id=MASK,
        policy=policy,
        steps=steps,
        block_length=block_length,
        shift=shift,
        on_step=watch,
    )
    assert torch.equal(filled.xt[~masked], xt[~masked])
    assert not (filled.xt[masked] == MASK).any()
    assert ((filled.xt >= 0) & (filled.xt < VOCAB)).all()
    assert not before.any()
    by_time = policy.may_wait or isinstance(policy, ReMDMPolicy)  # those use all the steps they get
    most = masked.sum(1) if steps is None else masked.sum(1).clamp(max=steps, min=steps if by_time else 0)
    assert (filled.nfe <= most).all()
    assert torch.equal(filled.nfe > 0, masked.any(1))


@every_policy
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_every_policy_ends_at_any_length(policy, data):
    """Lengths to 300, logits that do not change: no mask is left, within the steps."""
    length = data.draw(st.integers(1, 300))
    block_length = data.draw(st.none() | st.integers(1, length))
    steps = data.draw(st.none() | st.integers(-(-length // (block_length or length)), 2 * length))
    logits = torch.randn(1, length, 5, generator=torch.Generator().manual_seed(length))

    def constant(xt):
        return logits

    constant.leave_one_out = constant
    xt, masked = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length, dtype=torch.bool)
    options = dict(mask_id=4, policy=policy, steps=steps, block_length=block_length, shift=False)
    filled = fill(constant, xt, masked, temperature=data.draw(st.sampled_from([0.0, 1.0])), **options)
    assert not (filled.xt == 4).any()
    assert 1 <= int(filled.nfe) <= (length if steps is None else steps)


@both_shifts
@every_policy
@pytest.mark.parametrize("block_length", [None, 4], ids=["whole", "blocks"])
def test_a_row_does_not_depend_on_its_batch_mates(context_denoiser, policy, shift, block_length):
    """Alone, in any order, next to longer rows (then padded): the same text and the same number of forwards."""
    lengths = [5, 17, 1, 30, 12]
    xt, masked = random_batch(len(lengths), max(lengths), 0.8, seed=3)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    xt, masked = torch.where(real, xt, 0), masked & real
    options = dict(
        mask_id=MASK, policy=policy, steps=8, block_length=block_length, shift=shift, top_p=0.9, seed=2**63 + 5
    )
    index = torch.tensor([7, 0, 2**31 + 3, 4, 2**32 - 1])
    denoise = context_denoiser(VOCAB)
    together = fill(denoise, xt, masked, sample_index=index, **options)
    for rows in ([3], [1, 0], [4, 2, 0], [4, 3, 2, 1, 0]):
        width = max(lengths[row] for row in rows)
        some = fill(denoise, xt[rows, :width], masked[rows, :width], sample_index=index[rows], **options)
        assert torch.equal(some.xt, together.xt[rows, :width])
        assert torch.equal(some.nfe, together.nfe[rows])


@every_policy
def test_seed_and_sample_index_are_the_only_randomness(context_denoiser, policy):
    xt, masked = random_batch(1, 60, 1.0)
    denoise = context_denoiser(VOCAB, sharpness=0.3)

    def run(**options):
        return fill(denoise, xt, masked, mask_id=MASK, policy=policy, steps=6, **options).xt

    torch.manual_seed(0)
    first = run(seed=1)
    torch.manual_seed(1)
    assert torch.equal(run(seed=1), first)
    assert torch.equal(run(seed=torch.tensor([1])), first)
    assert not torch.equal(run(seed=2), first)
    assert not torch.equal(run(seed=1, sample_index=torch.tensor([1])), first)
    torch.manual_seed(1)
    drawn = run(seed=None)
    assert not torch.equal(run(seed=None), drawn)


@pytest.mark.parametrize("policy", ["confidence", "threshold"])
def test_temperature_zero_needs_no_seed(context_denoiser, policy):
    xt, masked = random_batch(2, 30, 0.9)
    runs = [
        fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=policy, steps=5, temperature=0.0, seed=seed).xt
        for seed in (0, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@both_shifts
def test_draws_stay_inside_the_nucleus(context_denoiser, shift):
    """Nucleus found again from the logits: the shortest prefix by falling probability that reaches top_p."""
    xt, masked = random_batch(4, 40, 0.9)
    denoise, top_p, seen, outside_top1 = context_denoiser(VOCAB, sharpness=0.5), 0.6, [], 0

    def watch(state, stats, decision):
        nonlocal outside_top1
        for row, column in (decision.commit & (stats.token >= 0)).nonzero().tolist():
            logits = seen[-1][row, column - shift].double()
            logits[MASK] = -torch.inf
            p, order = logits.softmax(0).sort(descending=True)
            size = int((p.cumsum(0) < top_p).sum()) + 1
            assert stats.token[row, column] in order[:size]
            outside_top1 += int(stats.token[row, column] != order[0])

    def watched(state_xt):
        seen.append(denoise(state_xt))
        return seen[-1]

    fill(watched, xt, masked, mask_id=MASK, policy="random", steps=6, top_p=top_p, shift=shift, on_step=watch)
    assert outside_top1 > 5  # it does draw


def test_top_k_one_is_greedy(context_denoiser):
    xt, masked = random_batch(2, 30, 0.9)
    options = dict(mask_id=MASK, policy=ConfidencePolicy(), steps=5)
    greedy = fill(context_denoiser(VOCAB), xt, masked, temperature=0.0, **options)
    assert torch.equal(fill(context_denoiser(VOCAB), xt, masked, top_k=1, **options).xt, greedy.xt)


def test_mask_id_beyond_the_vocabulary_is_allowed(context_denoiser):
    """Some models have an embedding for the mask but no logit."""
    xt, masked = random_batch(2, 12, 0.9)
    denoise = context_denoiser(VOCAB)
    filled = fill(lambda x: denoise(x.clamp(max=MASK)), xt, masked, mask_id=VOCAB, steps=3)
    assert (filled.xt < VOCAB).all()


def test_the_mask_is_not_drawn_even_when_it_is_the_most_likely(one_hot_denoiser):
    target = torch.full((1, 9), MASK)
    masked = torch.ones_like(target, dtype=torch.bool)
    for policy in EVERY_POLICY.values():
        denoise = one_hot_denoiser(target, VOCAB, False)
        filled = fill(denoise, target, masked, mask_id=MASK, policy=policy, steps=3, shift=False)
        assert not (filled.xt == MASK).any()


@both_shifts
def test_both_sides_are_read(shift):
    """Each position's answer is the token at its mirror image: the left half is told by the right one alone."""
    right = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    target = torch.cat((right.flip(1), right), dim=1)
    masked = (torch.arange(12) < 6).expand(2, 12).clone()
    masked[:, 0] = not shift

    def mirror(xt):
        known = xt.flip(1)
        logits = torch.where(known == MASK, 0.0, 50.0)[..., None] * torch.nn.functional.one_hot(known, VOCAB)
        return logits.roll(-1, dims=1) if shift else logits

    filled = fill(mirror, target, masked, mask_id=MASK, steps=2, shift=shift)
    assert torch.equal(filled.xt, target)


def test_nothing_masked_needs_no_forward():
    xt = torch.tensor([[MASK, 2, 3]])
    filled = fill(pytest.fail, xt, torch.zeros_like(xt, dtype=torch.bool), mask_id=MASK, steps=4)
    assert torch.equal(filled.xt, xt)
    assert filled.nfe.tolist() == [0]
    empty = fill(pytest.fail, xt[:0], torch.zeros(0, 3, dtype=torch.bool), mask_id=MASK)
    assert empty.xt.shape == (0, 3)


def test_inputs_are_left_alone(context_denoiser):
    xt, masked = random_batch(2, 20, 0.5)
    copies = xt.clone(), masked.clone()
    fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, steps=3)
    assert torch.equal(xt, copies[0])
    assert torch.equal(masked, copies[1])
    wide = torch.stack((xt, xt), dim=2)[:, :, 0]  # not contiguous
    assert torch.equal(
        fill(context_denoiser(VOCAB), wide, masked, mask_id=MASK, steps=3).xt,
        fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, steps=3).xt,
    )


def test_logits_may_be_half_precision_and_strided(context_denoiser):
    xt, masked = random_batch(2, 20, 0.5)
    denoise = context_denoiser(VOCAB)
    plain = fill(lambda x: denoise(x).bfloat16(), xt, masked, mask_id=MASK, steps=3)
    strided = fill(lambda x: denoise(x).bfloat16().mT.contiguous().mT, xt, masked, mask_id=MASK, steps=3)
    assert torch.equal(plain.xt, strided.xt)


@pytest.mark.filterwarnings("ignore:diffullama_ext. no compiled kernel")
@every_policy
@pytest.mark.parametrize("steps", [None, 5, 40])
def test_every_device_fills_the_same(context_denoiser, policy, device, steps):
    xt, masked = random_batch(3, 30, 0.7)
    denoise = context_denoiser(VOCAB)
    options = dict(mask_id=MASK, policy=policy, steps=steps, seed=3, top_p=0.9)
    on_cpu = fill(denoise, xt, masked, **options)

    def moved(x):
        return denoise(x.cpu()).to(device)

    moved.leave_one_out = lambda x: denoise.leave_one_out(x.cpu()).to(device)
    on_device = fill(moved, xt.to(device), masked.to(device), **options)
    assert torch.equal(on_device.xt.cpu(), on_cpu.xt)
    assert torch.equal(on_device.nfe.cpu(), on_cpu.nfe)


@both_shifts
def test_reading_all_rows_equals_gathering_them(context_denoiser, shift):
    """The path of a GPU, where counting the rows would make the host wait."""
    xt, masked = random_batch(3, 20, 0.5)
    state = State.start(
        xt, masked, mask_id=MASK, steps=None, block_length=None, seed=4, sample_index=torch.tensor([5, 6, 2**31])
    )
    state.begin(2)
    score = PositionStats(temperature=0.9, top_k=None, top_p=0.9)
    rows = masked | (torch.arange(20) == 3)
    scored = FunctionDenoiser(context_denoiser(VOCAB), shift).score(state, rows)
    assert len(scored.at) == int(rows.sum())
    flat = context_denoiser(VOCAB)(state.xt).flatten(0, 1)
    every = Scored(flat, torch.arange(60).roll(-shift))  # as off the CPU
    for gathered, read in zip(score(scored, rows, state), score(every, rows, state), strict=True):
        torch.testing.assert_close(gathered, read, rtol=0, atol=0, equal_nan=True)
        unread = gathered[~rows]
        assert ((unread == -1) | unread.isnan()).all()
        assert not ((gathered[rows] == -1) | gathered[rows].isnan()).any()


# --- blocks ----------------------------------------------------------------------------------------------------------


@every_policy
def test_blocks_are_filled_from_left_to_right(context_denoiser, policy):
    if policy.beyond_block and not isinstance(policy, KLASSPolicy):
        pytest.skip("commits ahead")
    xt, masked = random_batch(3, 50, 0.6)
    ordinal = masked.cumsum(1) - 1

    def watch(state, stats, decision):
        open_blocks = [set((ordinal[row][state.masked[row]] // 7).tolist()) for row in range(3)]
        for row in range(3):
            started = ordinal[row][masked[row] & ~state.masked[row]] // 7
            assert not open_blocks[row] or started.max() <= min(open_blocks[row])

    fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=policy, steps=20, block_length=7, on_step=watch)


@settings(max_examples=200, deadline=None)
@given(n_masked=st.integers(1, 300), block_length=st.integers(1, 300), extra=st.integers(0, 300))
def test_schedule_ends_every_block_in_time(n_masked, block_length, extra):
    """Quotas alone, without a denoiser: all blocks done within the steps, none without a step, at least one each."""
    n_blocks = -(-n_masked // block_length)
    steps = n_blocks + extra
    xt, masked = torch.zeros(1, n_masked, dtype=torch.int64), torch.ones(1, n_masked, dtype=torch.bool)
    state = State.start(xt, masked, mask_id=9, steps=steps, block_length=block_length, seed=0, sample_index=None)
    blocks = torch.arange(n_masked) // block_length
    first_step, last_step, left = {}, {}, n_masked
    for step in range(steps):
        state.begin(step)
        quota = int(state.quota())
        current = (n_masked - left) // block_length
        assert torch.equal(state.active[0], (blocks == current) & (torch.arange(n_masked) >= n_masked - left))
        assert 1 <= quota <= int(state.active.sum())
        state.apply(torch.ones_like(xt), Decision(state.active & (state.active.cumsum(1) <= quota)))
        first_step.setdefault(current, step)
        last_step[current] = step
        left -= quota
        if left == 0:
            break
    assert left == 0
    if n_masked % block_length == 0 and steps % n_blocks == 0:  # LLaDA's case: equal shares
        assert all(last_step[k] < (k + 1) * (steps // n_blocks) for k in range(n_blocks))
        if steps <= n_masked:
            assert all(first_step[k] == k * (steps // n_blocks) for k in range(n_blocks))


# --- failure ---------------------------------------------------------------------------------------------------------
