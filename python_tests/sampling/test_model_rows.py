# SPDX-License-Identifier: Apache-2.0
"""Models as row denoisers: only the rows asked for go through the head, and the shadow forward of verification."""

import pytest
import torch
from tiny_models import MASK_ID, VOCAB, causal_lm

from diffullama_ext.integrations import adapt
from diffullama_ext.sampling import ModelDenoiser, RowDenoiser, fill, generate, make_policy
from diffullama_ext.sampling.denoisers import FunctionDenoiser, positions_of
from diffullama_ext.sampling.state import State

families = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
both_shifts = pytest.mark.parametrize("shift", [False, True], ids=["same-row", "shift"])


def adapted(family, shift):
    return adapt(causal_lm(family).double(), mask_token=MASK_ID, shift=shift)


def case(shift, lengths=(9, 14, 5)):
    """Rows of several lengths, some of it masked, and a state in its first step."""
    generator = torch.Generator().manual_seed(3)
    length = max(lengths)
    xt = torch.randint(8, VOCAB, (len(lengths), length), generator=generator)
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    masked = (torch.rand(xt.shape, generator=generator) < 0.5) & real
    masked[:, 0] = False
    state = State.start(xt, masked, mask_id=MASK_ID, steps=None, block_length=None, seed=0, sample_index=None)
    state.begin(0)
    return state, real


@families
@both_shifts
def test_rows_equal_those_of_all_logits(family, shift):
    model, (state, real) = adapted(family, shift), case(shift)
    rows = state.masked | (torch.arange(14) == 3)
    denoise = ModelDenoiser(model, real)
    assert isinstance(denoise, RowDenoiser)
    head_rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, a, out: head_rows.append(out.shape))
    scored = denoise.score(state, rows)
    hook.remove()
    assert head_rows == [(1, int(rows.sum()), VOCAB)]  # no other row was computed
    expected = FunctionDenoiser(denoise, shift).score(state, rows)
    assert torch.equal(scored.at, expected.at)
    torch.testing.assert_close(scored.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_head_is_left_alone_after_an_error():
    model, (state, _) = adapted("gpt2", True), case(True)
    with pytest.raises(ValueError, match="key_padding"):
        ModelDenoiser(model, torch.ones(3, 5, dtype=torch.bool)).score(state, state.masked)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_compiled_model_gives_the_same_text():
    """Its graph is not touched: it computes all rows. With only the trunk compiled, the head still reads a few."""
    model = adapted("gpt2", True)
    options = dict(length=8, n=2, steps=4, seed=3)
    expected = generate(model, **options).sequences
    assert torch.equal(generate(torch.compile(model, backend="eager"), **options).sequences, expected)
    model.transformer.compile(backend="eager")
    assert torch.equal(generate(model, **options).sequences, expected)


def test_positions_of_a_fixed_width():
    """Off the CPU: as many a row as the state says, those asked for first; here on the device without values."""
    state, _ = case(True)
    rows = state.masked
    state.width = int(rows.sum(1).max())
    on_cpu = set(positions_of(rows, state).tolist())
    first = rows.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : state.width]
    assert on_cpu <= set((first + 14 * torch.arange(3)[:, None]).flatten().tolist())
    assert positions_of(rows.to("meta"), state).shape == (3 * state.width,)


# --- verification ----------------------------------------------------------------------------------------------------


@families
@both_shifts
def test_a_shadow_changes_nothing_that_it_stands_beside(family, shift):
    model, (state, real) = adapted(family, shift), case(shift)
    rows = state.maskable | (torch.arange(14) == 4) & real
    denoise = ModelDenoiser(model, real)
    scored, unseen = denoise.verify(state, rows)
    torch.testing.assert_close(scored.logits, denoise.score(state, rows).logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(scored.at, unseen.at)
    differs = (scored.logits - unseen.logits).abs().amax(1)
    told = state.xt.flatten()[scored.at] != MASK_ID  # a mask tells nothing, and without a shift its shadow is itself
    assert differs[told].min() > 1e-3
    assert shift or differs[~told].max() < 1e-9


@both_shifts
def test_a_shadow_does_not_see_the_token_it_judges(shift):
    """One layer, so that no hidden state can tell it: another token at j changes the ordinary logits, not the shadow's.

    Another token elsewhere changes both.
    """
    model = adapt(causal_lm("llama", num_hidden_layers=1).double(), mask_token=MASK_ID, shift=shift)
    xt = torch.randint(8, VOCAB, (1, 10), generator=torch.Generator().manual_seed(1))
    state = State.start(
        xt, torch.arange(10)[None] > 0, mask_id=MASK_ID, steps=None, block_length=None, seed=0, sample_index=None
    )
    denoise, rows = ModelDenoiser(model), torch.arange(10)[None] == 6

    def logits(ids):
        state.xt = ids
        return torch.stack([part.logits[0] for part in denoise.verify(state, rows)])

    def changed(column):
        other = xt.clone()
        other[0, column] = (xt[0, column] - 8 + 1) % (VOCAB - 8) + 8
        return (logits(other) - logits(xt)).abs().amax(1) > 1e-9

    assert changed(6).tolist() == [True, False]
    assert changed(2).tolist() == [True, True]
    assert changed(9).tolist() == [True, True]


@both_shifts
def test_wino_with_a_model(shift):
    model, (state, real) = adapted("llama", shift), case(shift)
    taken_back, calls = 0, 0

    def watch(state, stats, decision):
        nonlocal taken_back, calls
        taken_back, calls = taken_back + int(decision.remask.sum()), calls + 1

    options = dict(mask_id=MASK_ID, policy=make_policy("wino", threshold=0.0), shift=shift, temperature=0.0)
    filled = fill(ModelDenoiser(model, real), state.xt, state.masked, on_step=watch, **options)
    assert not (filled.xt[state.masked] == MASK_ID).any()
    assert torch.equal(filled.xt[~state.masked], state.xt[~state.masked])
    assert taken_back > 0
    assert int(filled.nfe.max()) == calls
