# SPDX-License-Identifier: Apache-2.0
"""Traces: frames and commits against the run itself, the memory bound, and what merging keeps."""

import numpy as np
import pytest
import torch

from diffullama_ext.sampling import Decision, Policy, fill
from diffullama_ext.sampling.trace import Trace

VOCAB, MASK = 9, 4


class Hesitant(Policy):
    """Commits the lowest masked position, and in step 2 takes back what it committed in step 0."""

    def decide(self, stats, state):
        first = state.active & (state.active.cumsum(1) == 1)
        first = first | state.active & (state.steps_left[:, None] == 1)
        taken_back = state.maskable & (state.maskable.cumsum(1) == 1)
        return Decision(first, taken_back if state.step == 2 else None)


def record(context_denoiser, policy="confidence", *, steps=None, shift=True, trace=None, temperature=1.0, length=12):
    """(trace, what the run returned, [(xt, masked, stats, written) after each step])."""
    generator = torch.Generator().manual_seed(3)
    xt = torch.randint(0, VOCAB, (2, length), generator=generator)
    masked = torch.rand(2, length, generator=generator) < 0.8
    masked[:, 0] = False
    trace = trace or Trace()
    steps_seen = []

    def watch(state, stats, written):
        trace(state, stats, written)
        steps_seen.append((state.xt, state.masked, stats, written))

    denoise = context_denoiser(VOCAB)
    filled = fill(
        denoise,
        xt,
        masked,
        mask_id=MASK,
        policy=policy,
        steps=steps,
        shift=shift,
        temperature=temperature,
        on_step=watch,
    )
    return trace, filled, steps_seen, masked, denoise


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("policy", ["confidence", "threshold", "random", Hesitant()])
def test_history_is_the_run(context_denoiser, policy, shift):
    trace, filled, seen, masked, _ = record(context_denoiser, policy, steps=12, shift=shift)
    history = trace.history()
    assert history.step.tolist() == list(range(len(seen)))
    assert trace.steps == len(seen)
    for t, (xt, now, stats, written) in enumerate(seen):
        assert torch.equal(history.xt[t].long(), xt)
        assert torch.equal(history.masked[t], now)
        assert torch.equal(history.token[t].long(), stats.token)
        assert torch.equal(history.prob[t].isnan(), stats.token < 0)
        assert torch.equal(history.committed[t], written.commit)
        assert torch.equal(history.remasked[t], torch.zeros_like(now) if written.remask is None else written.remask)
    assert torch.equal(history.prediction[-1].long(), filled.xt)
    assert torch.equal(trace.maskable, masked)


def test_commits_are_those_of_the_last_write(context_denoiser):
    trace, filled, seen, masked, _ = record(context_denoiser, Hesitant(), steps=12)
    history = trace.history()
    for b, j in masked.nonzero().tolist():
        writes = [t for t in range(len(seen)) if history.committed[t, b, j] and not history.masked[t, b, j]]
        assert trace.commit_step[b, j] == writes[-1]
        stats = seen[writes[-1]][2]
        assert trace.confidence[b, j] == stats.prob[b, j]
        assert trace.entropy[b, j] == stats.entropy[b, j]
        assert filled.xt[b, j] == stats.token[b, j]
    first = masked & (masked.cumsum(1) == 1)
    assert torch.equal(trace.n_remasked, first.long())
    assert (trace.commit_step[first] == 3).all()
    assert (trace.commit_step[~masked] == -1).all()
    assert trace.confidence[~masked].isnan().all()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_candidates_are_the_most_likely_tokens(context_denoiser, top_k, shift):
    """Against a softmax of the logits without the mask's column."""
    trace, _, seen, masked, denoise = record(context_denoiser, steps=4, shift=shift, trace=Trace(top_k=top_k))
    history = trace.history()
    xt = torch.where(masked, MASK, seen[0][0])
    for t in range(len(seen)):
        logits = denoise(xt).double()
        logits[..., MASK] = -torch.inf
        probs, ids = logits.softmax(-1).sort(dim=-1, descending=True)
        for b, j in (history.token[t] >= 0).nonzero().tolist():
            k = min(top_k, VOCAB - 1)
            assert torch.equal(history.candidates[t, b, j, :k].long(), ids[b, j - shift, :k])
            torch.testing.assert_close(history.candidate_probs[t, b, j, :k].double(), probs[b, j - shift, :k])
            assert (history.candidates[t, b, j, k:] == -1).all()
        assert (history.candidates[t][history.token[t] < 0] == -1).all()
        xt = seen[t][0]
    assert not (history.candidates == MASK).any()


def test_no_candidates(context_denoiser):
    trace, *_ = record(context_denoiser, trace=Trace(top_k=0))
    assert trace.history().candidates.shape[-1] == 0


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_memory_is_bounded_and_the_whole_run_stays(context_denoiser, frames):
    full, _, seen, masked, _ = record(context_denoiser, length=40)
    frame_bytes = sum(value[0].nbytes for value in full.history())
    bounded, *_ = record(context_denoiser, length=40, trace=Trace(max_bytes=frames * frame_bytes))
    all_frames, history = full.history(), bounded.history()
    assert 1 < len(history.step) <= frames < len(seen)
    assert history.step[-1] == all_frames.step[-1]
    assert torch.equal(history.committed.sum(0), all_frames.committed.sum(0))  # each exactly once
    begin = 0
    for t, step in enumerate(history.step.tolist()):
        assert torch.equal(history.xt[t], all_frames.xt[step])
        assert torch.equal(history.masked[t], all_frames.masked[step])
        assert torch.equal(history.committed[t], all_frames.committed[begin : step + 1].any(0))
        begin = step + 1
    for name in ("commit_step", "confidence", "entropy"):
        torch.testing.assert_close(getattr(bounded, name), getattr(full, name), equal_nan=True, rtol=0, atol=0)
    at_commit = torch.where(history.committed, history.prob, 0).sum(0)
    torch.testing.assert_close(at_commit[masked], full.confidence[masked])


@pytest.mark.parametrize("policy", ["p2", "remdm"])
def test_merged_frames_keep_the_statistics_of_commits(context_denoiser, policy):
    """Of policies that look at visible tokens again and take some back."""
    trace, _, _, masked, _ = record(context_denoiser, policy, steps=12, length=40)
    assert trace.n_remasked.sum() > 0 or policy == "remdm"
    history = trace.history(max_frames=3)
    stays = history.committed & ~history.masked
    last = stays.flip(0).int().argmax(dim=0)  # from the end
    at = (len(history.step) - 1 - last)[None]
    for name in ("prob", "entropy"):
        then = getattr(history, name).gather(0, at)[0]
        own = trace.confidence if name == "prob" else trace.entropy
        assert torch.equal(then[masked], own[masked])


def test_fewer_frames_can_be_asked_for(context_denoiser):
    trace, filled, seen, *_ = record(context_denoiser, length=40)
    history = trace.history(max_frames=4)
    assert len(history.step) <= 4
    assert torch.equal(history.xt[-1].long(), filled.xt)
    assert len(trace.history().step) == len(seen)  # what was recorded is as it was


def test_arrays_can_be_saved(context_denoiser, tmp_path):
    trace, filled, *_ = record(context_denoiser)
    np.savez(tmp_path / "run.npz", **trace.arrays())
    with np.load(tmp_path / "run.npz") as saved:
        assert (saved["xt"][-1] == filled.xt.numpy()).all()
        assert (saved["commit_step"] == trace.commit_step.numpy()).all()
        assert set(saved) >= {"step", "prob", "entropy", "candidates", "commit_confidence", "maskable"}


def test_a_trace_is_of_the_last_run_and_an_empty_one_says_so(context_denoiser):
    trace = Trace()
    with pytest.raises(ValueError, match="the trace is empty"):
        trace.history()
    record(context_denoiser, trace=trace, length=30)
    record(context_denoiser, trace=trace, length=8, steps=2)
    assert trace.history().xt.shape == (2, 2, 8)
    assert trace.steps == 2


@pytest.mark.parametrize(("arguments", "text"), [({"top_k": -1}, "top_k"), ({"max_bytes": 0}, "max_bytes")])
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        Trace(**arguments)
