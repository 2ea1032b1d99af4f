# SPDX-License-Identifier: Apache-2.0
"""Caches with tiny models in float64: the exact one gives the uncached text, the others say how far they are off."""

from dataclasses import replace

import pytest
import torch
from tiny_models import MASK_ID, VOCAB, causal_lm

from diffullama_ext.integrations import adapt
from diffullama_ext.sampling import Guided, ModelDenoiser, fill, generate, make_policy
from diffullama_ext.sampling.caches import BlockCausalDenoiser, CachedDenoiser, block_of_columns
from diffullama_ext.sampling.state import State

families = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
both_shifts = pytest.mark.parametrize("shift", [False, True], ids=["same-row", "shift"])


def adapted(family, shift):
    return adapt(causal_lm(family).double(), mask_token=MASK_ID, shift=shift)


def ragged(*, gaps=False):
    """Prompts of 2, 7 and 4 tokens and 12, 9 and 17 to write; with gaps, fixed text in between and behind."""
    generator = torch.Generator().manual_seed(5)
    prompts, new = torch.tensor([2, 7, 4]), torch.tensor([12, 9, 17])
    length = int((prompts + new).max())
    column = torch.arange(length)
    xt = torch.randint(8, VOCAB, (3, length), generator=generator)
    real = column < (prompts + new)[:, None]
    masked = (column >= prompts[:, None]) & real
    if gaps:
        masked &= torch.rand(masked.shape, generator=generator) < 0.7
    return xt, masked, real


class Recorded:
    """A denoiser that keeps what it returned, by position."""

    def __init__(self, denoise):
        self.denoise, self.steps = denoise, []

    def score(self, state, rows):
        scored = self.denoise.score(state, rows)
        self.steps.append(dict(zip(scored.at.tolist(), scored.logits, strict=True)))
        return scored


def assert_same_logits(some, others):
    assert len(some) == len(others)
    for left, right in zip(some, others, strict=True):
        assert left.keys() == right.keys()
        for at in left:
            torch.testing.assert_close(left[at], right[at], rtol=1e-8, atol=1e-8)


@families
@both_shifts
@pytest.mark.parametrize("gaps", [False, True], ids=["prompts", "gaps"])
@pytest.mark.parametrize("policy", ["confidence", "threshold", "saber", "p2"])
def test_the_block_cache_is_exact(family, shift, gaps, policy):
    """Every logit of every step, rows entering blocks at different times; and so the text."""
    model, (xt, masked, real) = adapted(family, shift), ragged(gaps=gaps)
    policy = make_policy("threshold", threshold=0.3) if policy == "threshold" else policy
    options = dict(mask_id=MASK_ID, policy=policy, steps=13, block_length=4, shift=shift, seed=1)
    plain = Recorded(BlockCausalDenoiser(model, real))
    cached = Recorded(CachedDenoiser(model, real, "block"))
    expected, filled = fill(plain, xt, masked, **options), fill(cached, xt, masked, **options)
    assert torch.equal(filled.xt, expected.xt)
    assert torch.equal(filled.nfe, expected.nfe)
    assert_same_logits(cached.steps, plain.steps)
    bidirectional = fill(ModelDenoiser(model, real), xt, masked, **options)
    assert not torch.equal(bidirectional.xt, expected.xt)  # the mask does something


@both_shifts
def test_a_step_computes_the_block_alone(shift):
    """Rows of the head and of the trunk: the last block once more where a new one begins."""
    model = adapted("gpt2", shift)
    xt = torch.randint(8, VOCAB, (1, 17), generator=torch.Generator().manual_seed(2))
    masked = torch.arange(17)[None] >= 5
    widths = {}
    for kind in ("prefix", "dual", "block"):
        widths[kind] = seen = []
        hook = model.transformer.wte.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[0].shape[1])
        )
        denoise = CachedDenoiser(model, None, kind)
        fill(denoise, xt, masked, mask_id=MASK_ID, steps=6, block_length=4, shift=shift)
        hook.remove()
    extra = int(shift)  # row s - 1
    assert widths["dual"] == [17, 4 + extra] * 3
    assert widths["prefix"] == [17, 12 + extra, 17, 8 + extra, 17, 4 + extra]
    assert widths["block"] == [9, 4 + extra, 8, 4 + extra, 8, 4 + extra]


@families
@both_shifts
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_approximate_caches_are_exact_when_they_are_fresh(family, shift, kind):
    """The first step of each block is a full forward: with one step a block nothing drifts."""
    model, (xt, masked, real) = adapted(family, shift), ragged()
    options = dict(mask_id=MASK_ID, steps=5, block_length=4, shift=shift, seed=1)
    cached = CachedDenoiser(model, real, kind, measure=True)
    filled = fill(cached, xt, masked, **options | dict(policy=make_policy("threshold", threshold=0.0)))
    plain = fill(
        ModelDenoiser(model, real), xt, masked, **options | dict(policy=make_policy("threshold", threshold=0.0))
    )
    assert torch.equal(filled.xt, plain.xt)
    drift = cached.drift()
    assert drift.n_positions == int(masked.sum())
    assert drift.max_total_variation < 1e-9
    assert drift.argmax_changed == 0


@families
@both_shifts
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_approximate_caches_keep_what_they_say(family, shift, kind):
    """An independent model of the cache: keys outside of the window are those of the block's first step.

    For one layer they depend on the token at their position alone, so a forward over the old tokens outside of the
    window and the new ones inside gives the same logits.
    """
    model = adapt(
        causal_lm(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1}).double(),
        mask_token=MASK_ID,
        shift=shift,
    )
    xt = torch.randint(8, VOCAB, (1, 14), generator=torch.Generator().manual_seed(4))
    masked = torch.arange(14)[None] >= 3
    old, steps = {}, []

    class Model:
        def score(self, state, rows):
            block = int(state.current)
            old.setdefault(block, state.xt)
            begin, end = 3 + 4 * block - int(shift), 14 if kind == "prefix" else min(3 + 4 * block + 4, 14)
            column = torch.arange(14)
            seen = torch.where((column >= begin) & (column < end), state.xt, old[block])
            scored = ModelDenoiser(model).score(replace(state, xt=seen), rows)
            steps.append(dict(zip(scored.at.tolist(), scored.logits, strict=True)))
            return scored

    options = dict(mask_id=MASK_ID, policy="confidence", block_length=4, shift=shift)
    cached = Recorded(CachedDenoiser(model, None, kind))
    assert torch.equal(fill(cached, xt, masked, **options).xt, fill(Model(), xt, masked, **options).xt)
    assert_same_logits(cached.steps, steps)


@both_shifts
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_drift_is_found_and_reported(shift, kind):
    model, (xt, masked, real) = adapted("llama", shift), ragged()
    cached = CachedDenoiser(model, real, kind, measure=True)
    assert cached.drift() is None
    unmeasured = CachedDenoiser(model, real, kind)
    options = dict(mask_id=MASK_ID, block_length=4, shift=shift)
    assert torch.equal(fill(cached, xt, masked, **options).xt, fill(unmeasured, xt, masked, **options).xt)
    drift = cached.drift()
    assert 1e-4 < drift.total_variation <= drift.max_total_variation <= 1
    assert 0 <= drift.argmax_changed < 1
    assert unmeasured.drift() is None


@pytest.mark.parametrize("kind", ["prefix", "dual", "block"])
def test_rows_do_not_depend_on_their_batch_mates(kind):
    """Although rows enter their blocks at different times: each refreshes its own keys alone."""
    model, (xt, masked, real) = adapted("llama", True), ragged(gaps=True)
    options = dict(mask_id=MASK_ID, block_length=3, policy=make_policy("threshold", threshold=0.3), seed=3)
    together = fill(CachedDenoiser(model, real, kind), xt, masked, **options)
    for row in range(3):
        width = int(real[row].sum())
        part = (slice(row, row + 1), slice(0, width))
        alone = fill(
            CachedDenoiser(model, None, kind), xt[part], masked[part], sample_index=torch.tensor([row]), **options
        )
        assert torch.equal(alone.xt, together.xt[part])
        assert torch.equal(alone.nfe, together.nfe[row : row + 1])


@pytest.mark.parametrize("cache", ["prefix", "dual", "block"])
def test_generate_with_a_cache(cache):
    model = adapted("llama", True)
    prompts, mask = torch.tensor([[1, 1, 20, 21], [22, 23, 24, 25]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = dict(length=12, block_length=4, prompt_ids=prompts, attention_mask=mask, steps=6)
    out = generate(model, cache=cache, measure_drift=True, **options)
    assert torch.equal(out.sequences[:, :4], prompts)
    assert not (out.sequences == MASK_ID).any()
    assert out.cache_drift.n_positions > 0
    assert (out.cache_drift.max_total_variation < 1e-9) == (cache == "block")
    assert generate(model, cache=cache, **options).cache_drift is None
    guided = generate(model, cache=cache, cfg=0.5, **options)  # each branch has a cache of its own
    assert torch.equal(guided.nfe, 2 * out.nfe)


def test_guidance_over_exact_caches_is_exact():
    model, (xt, masked, real) = adapted("llama", True), ragged()
    options = dict(mask_id=MASK_ID, block_length=4, steps=12)
    cached = Guided(CachedDenoiser(model, real, "block"), 0.7, negative_denoise=CachedDenoiser(model, real, "block"))
    plain = Guided(BlockCausalDenoiser(model, real), 0.7)
    assert torch.equal(fill(cached, xt, masked, **options).xt, fill(plain, xt, masked, **options).xt)


def test_blocks_of_columns():
    """Of fixed text, the block of the last maskable position before it."""
    masked = torch.tensor([[False, False, True, True, False, True, False, True, False]])
    xt = torch.zeros_like(masked, dtype=torch.int64)
    state = State.start(xt, masked, mask_id=9, steps=None, block_length=2, seed=0, sample_index=None)
    assert block_of_columns(state).tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1, 1]]


def test_rejects_bad_input():
    model = adapted("llama", True)
    with pytest.raises(ValueError, match=r"cache must be one of 'prefix', 'dual', 'block', got 'suffix'"):
        generate(model, length=4, cache="suffix", start_id=1)
    with pytest.raises(ValueError, match=r"measure_drift must be False without a cache"):
        generate(model, length=4, measure_drift=True, start_id=1)
    with pytest.raises(ValueError, match=r"negative must be None where cfg is 0"):
        generate(model, length=4, negative=lambda state: state.xt, start_id=1)
    with pytest.raises(ValueError, match=r"WINOPolicy.* needs a denoiser that can verify, CachedDenoiser cannot"):
        generate(model, length=4, cache="dual", policy="wino", start_id=1)
