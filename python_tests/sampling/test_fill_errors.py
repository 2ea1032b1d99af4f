# SPDX-License-Identifier: Apache-2.0
"""The loop where something is wrong: no token to draw, a policy that does not finish, bad arguments."""

import pytest
import torch
from test_fill import MASK, VOCAB, every_policy, random_batch

from diffullama_ext.sampling import Decision, Policy, ThresholdPolicy, fill


@every_policy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["row", "position"])
def test_rows_without_a_token_raise(context_denoiser, policy, bad, where):
    xt, masked = random_batch(4, 20, 0.5)
    calls = 0

    def broken(state_xt):
        nonlocal calls
        calls += 1
        logits = context_denoiser(VOCAB)(state_xt)
        for row in (0, 2):
            logits[row, slice(None) if where == "row" else int(masked[row].nonzero()[-1]) - 1, 3] = bad
        return logits

    broken.leave_one_out = context_denoiser(VOCAB).leave_one_out
    with pytest.raises(RuntimeError, match=r"no token can be drawn in rows \[(0, 2|0|2)\]: .*NaN"):
        fill(broken, xt, masked, mask_id=MASK, policy=policy, steps=10)
    assert calls == (1 if where == "row" and not policy.may_wait else calls)
    assert calls <= 10


def test_nan_where_nothing_is_masked_does_not_matter(context_denoiser):
    xt, masked = random_batch(2, 20, 0.5)

    def broken(state_xt):
        logits = context_denoiser(VOCAB)(state_xt)
        logits[:, :-1][~masked[:, 1:]] = torch.nan
        return logits

    clean = fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, steps=5)
    assert torch.equal(fill(broken, xt, masked, mask_id=MASK, steps=5).xt, clean.xt)


class NeverInRowOne(Policy):
    def decide(self, stats, state):
        return Decision(state.active & (torch.arange(len(state.xt)) != 1)[:, None])


class OneAtATime(Policy):
    def decide(self, stats, state):
        return Decision(state.active & (state.active.cumsum(1) == 1))


def test_a_policy_that_commits_nothing_raises(context_denoiser):
    xt, masked = random_batch(3, 20, 0.5)
    with pytest.raises(RuntimeError, match=r"rows \[1\] still have masks after step 1: .*NeverInRowOne"):
        fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=NeverInRowOne(), steps=5)


def test_a_policy_that_is_late_raises(context_denoiser):
    xt, masked = random_batch(1, 20, 1.0)
    with pytest.raises(RuntimeError, match=r"rows \[0\] still have masks after step 5: .*OneAtATime"):
        fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=OneAtATime(), steps=5)
    assert fill(context_denoiser(VOCAB), xt, masked, mask_id=MASK, policy=OneAtATime()).nfe.tolist() == [19]


def arguments(**changes):
    xt = torch.zeros(2, 6, dtype=torch.int64)
    masked = torch.ones(2, 6, dtype=torch.bool)
    masked[:, 0] = False
    return dict(denoise=lambda x: torch.zeros(2, 6, VOCAB), xt=xt, masked=masked, mask_id=MASK, steps=2) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(xt=torch.zeros(2, 6)), TypeError, r"xt must be int64\[B, L\], got float32"),
        (dict(xt=torch.zeros(6, dtype=torch.int64)), ValueError, r"xt must be int64\[B, L\], got int64\[6\]"),
        (dict(masked=torch.ones(2, 5, dtype=torch.bool)), ValueError, r"masked must be bool\[2, 6\], got bool\[2, 5\]"),
        (dict(masked=torch.ones(2, 6, dtype=torch.bool)), ValueError, r"position 0 with shift=True.*rows \[0, 1\]"),
        (dict(mask_id=-1), ValueError, r"mask_id must be in \[0, .*got -1"),
        (dict(steps=0), ValueError, r"steps must be in \[1, .*got 0"),
        (dict(steps=2.5), TypeError, r"steps must be an int, got 2.5"),
        (dict(steps=True), TypeError, r"steps must be an int, got True"),
        (dict(block_length=0), ValueError, r"block_length must be in \[1, .*got 0"),
        (dict(block_length=2), ValueError, r"steps must be at least the 3 blocks of 2 positions, got 2"),
        (dict(policy="best"), ValueError, r"policy must be one of '.*'threshold'.*, got 'best'"),
        (dict(policy=ThresholdPolicy), TypeError, r"policy must be one of .* or a Policy, got <class"),
        (dict(temperature=None), TypeError, r"temperature must be a number, got None"),
        (dict(policy=None), TypeError, r"policy must be one of .* or a Policy, got None"),
        (dict(temperature=-0.1), ValueError, r"temperature must be in \[0, inf\], got -0.1"),
        (dict(temperature=float("nan")), ValueError, r"temperature must be in \[0, inf\], got nan"),
        (dict(top_p=0.0), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), ValueError, r"top_p must be in \(0, 1\], got 1.1"),
        (dict(top_k=0), ValueError, r"top_k must be in \[1, .*got 0"),
        (dict(seed=0.5), TypeError, r"seed must be an int, got 0.5"),
        (dict(sample_index=torch.arange(3)), ValueError, r"sample_index must be int64\[2\], got int64\[3\]"),
        (dict(denoise=lambda x: torch.zeros(2, 5, VOCAB)), ValueError, r"denoise\(xt\) must be .*\[2, 6, V\], got"),
        (dict(denoise=lambda x: torch.zeros(2, 6, VOCAB).long()), TypeError, r"denoise\(xt\) must be float32/"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_rejects_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        fill(**arguments(**changes))
