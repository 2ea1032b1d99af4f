# SPDX-License-Identifier: Apache-2.0
"""The objective against the formulas of the papers, written out over full logits."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_cases import (
    BATCH,
    CALL,
    LENGTH,
    SEED,
    STEP,
    adapted,
    assert_same_gradients,
    full_logits,
    gradients,
    objective,
    tokens,
)
from scipy.stats import kstest
from tiny_models import FAMILIES, MASK_ID
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffullama_ext import mask_tokens
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig, ObjectiveOutput, draw_t
from diffullama_ext.reference.philox import TAG_TIME

# --- t ----------------------------------------------------------------------------------------------------------------


def test_t_is_a_function_of_seed_and_sample_number() -> None:
    index = [0, 1, 2**31, 2**32 + 5, 2**40]
    words = [int(oracles.philox(0, i % 2**32, TAG_TIME, i >> 32, SEED)[0]) for i in index]
    expected = torch.tensor([1 - (1 - 1e-3) * (word / 2**32) for word in words], dtype=torch.float64).float()
    assert torch.equal(draw_t(torch.tensor(index), SEED), expected)
    shuffled = [3, 0, 4]
    assert torch.equal(draw_t(torch.tensor(index)[shuffled], SEED), expected[shuffled])


@pytest.mark.parametrize("strata", [0, 8])
@pytest.mark.parametrize("t_min", [0.0, 1e-3, 0.5])
def test_t_is_uniform(strata: int, t_min: float) -> None:
    t = draw_t(torch.arange(20_000), SEED, t_min=t_min, strata=strata)
    assert t.dtype == torch.float32
    assert t_min < t.min()
    assert t.max() <= 1
    assert kstest(t.numpy(), "uniform", args=(t_min, 1 - t_min)).pvalue > 1e-3


@given(first=st.integers(0, 2**33), strata=st.integers(1, 50), seed=st.integers(0, 2**63 - 1))
def test_any_n_consecutive_samples_cover_the_interval(first: int, strata: int, seed: int) -> None:
    t = draw_t(torch.arange(first, first + strata), seed, t_min=0.0, strata=strata)
    stratum = np.ceil(t.double().numpy() * strata * (1 - 1e-7)).astype(int)  # t in ((n - 1) / strata, n / strata]
    assert sorted(stratum) == list(range(1, strata + 1))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])
@pytest.mark.parametrize("partial", [False, True], ids=["all maskable", "prompts"])
def test_the_loss_is_the_dense_formula(normalizer: str, shift: bool, partial: bool) -> None:
    model, x0 = adapted(), tokens()
    maskable = torch.arange(LENGTH) >= torch.tensor([[0], [3], [5], [11]]) if partial else None
    out = objective(normalizer=normalizer, shift=shift)(model, x0, maskable=maskable, **CALL)
    out.loss.backward()
    got = gradients(model)
    model.zero_grad()

    t = draw_t(torch.arange(BATCH), SEED)
    xt, masked, _, _ = mask_tokens(x0, t, mask_id=MASK_ID, maskable=maskable, seed=SEED)
    nll = oracles.dense_nll(full_logits(model, xt), x0, masked, shift)
    per_sequence = torch.tensor(oracles.denominator(normalizer, masked, maskable, shift))
    expected = ((nll / t[:, None]).sum(dim=1) / per_sequence).sum()
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(got, gradients(model))
    torch.testing.assert_close(out.stats.nll_sum, nll.sum())
    scored = masked.clone()
    scored[:, 0] &= not shift
    assert torch.equal(out.masked, scored)
    assert out.stats.n_scored == scored.sum()
    assert torch.equal(out.t, t)


def released_diffullama_loss(model: PreTrainedModel, x0: Tensor, src_mask: Tensor, t: Tensor, drawn: Tensor) -> Tensor:
    """sum(CE / t over masked) / #masked after the shift, masked = (xt == mask id): the released trainer."""
    xt = torch.where(drawn & ~src_mask, MASK_ID, x0)
    logits, target = full_logits(model, xt)[:, :-1], x0[:, 1:]
    loss_mask = (xt == MASK_ID)[:, 1:]
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    return (nll * loss_mask / t[:, None]).sum() / loss_mask.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_recipe_diffullama_is_the_released_formula(family: str) -> None:
    model, x0 = adapted(family), tokens()
    x0[:, 2] = MASK_ID  # a real token of the source that has the reused id: the released code scores it
    src_mask = torch.arange(LENGTH).expand(BATCH, -1) < 5
    config = ObjectiveConfig.recipe("diffullama", mask_id=MASK_ID)
    out = DiffusionObjective(config)(model, x0, maskable=~src_mask, **CALL)
    drawn = mask_tokens(x0, out.t, mask_id=MASK_ID, seed=SEED).masked
    expected = released_diffullama_loss(model, x0, src_mask, out.t, drawn)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert out.masked[:, 2].all()


def test_recipe_llada_is_sum_over_p_by_all_tokens() -> None:
    model, x0 = adapted(), tokens()
    out = DiffusionObjective(ObjectiveConfig.recipe("llada", mask_id=MASK_ID))(model, x0, **CALL)
    xt, masked, _, _ = mask_tokens(x0, out.t, mask_id=MASK_ID, seed=SEED)
    p = out.t[:, None].expand_as(x0)
    nll = nn.functional.cross_entropy(full_logits(model, xt)[masked], x0[masked], reduction="none")
    torch.testing.assert_close(out.loss, (nll / p[masked]).sum() / (BATCH * LENGTH))


def test_recipe_llada_sft_is_the_mean_over_answers() -> None:
    model, x0 = adapted(), tokens()
    answer = torch.arange(LENGTH) >= torch.tensor([[2], [6], [9], [10]])
    out = DiffusionObjective(ObjectiveConfig.recipe("llada_sft", mask_id=MASK_ID))(model, x0, maskable=answer, **CALL)
    xt, masked, _, _ = mask_tokens(x0, out.t, mask_id=MASK_ID, maskable=answer, seed=SEED)
    nll = nn.functional.cross_entropy(full_logits(model, xt)[masked], x0[masked], reduction="none")
    row = masked.nonzero()[:, 0]
    torch.testing.assert_close(out.loss, (nll / out.t[row] / answer.sum(dim=1)[row]).sum() / BATCH)


def test_tokens_that_may_not_be_masked_never_count() -> None:
    model, x0 = adapted(), tokens()
    x0[:, :6] = MASK_ID
    maskable = (torch.arange(LENGTH) >= 6).expand(BATCH, -1)
    out = objective()(model, x0, maskable=maskable, **CALL)
    assert not out.masked[:, :6].any()
    assert objective().denominator(x0, maskable=maskable, seed=SEED) == BATCH * 6


@pytest.mark.parametrize("loss_mask", ["draw", "equality"])
@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch"])
def test_nothing_to_score_gives_zero(normalizer: str, loss_mask: str) -> None:
    model = adapted()
    x0 = torch.full((2, 5), MASK_ID + 1)
    nothing = torch.zeros_like(x0, dtype=torch.bool)
    goal = objective(normalizer=normalizer, loss_mask=loss_mask)
    with pytest.warns(UserWarning, match=r"a batch has no token that may be masked and scored.*\(1 so far\)"):
        out = goal(model, x0, maskable=nothing, **CALL)
    out.loss.backward()
    assert out.loss == 0
    assert out.stats.n_scored == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_tokens_that_equal_the_mask_keep_a_batch_from_being_empty() -> None:
    """By the released code's loss mask they are scored, though nothing may be masked."""
    x0, goal = torch.full((2, 5), MASK_ID), objective(loss_mask="equality", normalizer="masked")
    out = goal(adapted(), x0, maskable=torch.zeros_like(x0, dtype=torch.bool), **CALL)
    assert out.loss > 0
    assert goal.n_empty_batches == 0


@pytest.mark.parametrize("value", [7, 7.0, torch.tensor(7.0)], ids=["int", "float", "tensor"])
def test_a_number_is_the_denominator(value: float | Tensor) -> None:
    out = objective()(adapted(), tokens(), normalizer=value, **CALL)
    torch.testing.assert_close(out.loss, out.stats.weighted_sum / 7)


def test_given_noise_levels_are_used() -> None:
    x0, t = tokens(), torch.tensor([1.0, 1e-9, 0.5, 1.0])
    out = objective(shift=False)(adapted(), x0, t=t, **CALL)
    assert out.masked.sum(dim=1).tolist()[::3] == [LENGTH, LENGTH]
    assert not out.masked[1].any()
    assert torch.equal(out.t, t)


# --- independence of the batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch"])
def test_the_split_into_micro_batches_changes_nothing(normalizer: str) -> None:
    model, x0, index = adapted(), tokens(), torch.tensor([5, 2, 2**35, 9])
    goal = objective(normalizer=normalizer)
    whole = goal(model, x0, sample_index=index, **CALL)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()

    parts = [torch.tensor([3, 0]), torch.tensor([1]), torch.tensor([2])]
    total = sum(goal.denominator(x0[part], sample_index=index[part], seed=SEED) for part in parts)
    assert total == goal.denominator(x0, sample_index=index, seed=SEED)
    loss = 0.0
    for part in parts:
        out = goal(model, x0[part], sample_index=index[part], **CALL)
        assert torch.equal(out.masked, whole.masked[part])
        assert torch.equal(out.t, whole.t[part])
        share = out.stats.weighted_sum / total
        share.backward()
        loss += share.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])
@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence"])
def test_padding_on_either_side_changes_nothing(family: str, shift: bool, normalizer: str) -> None:
    model, x0, n_pad = adapted(family), tokens(), 3
    goal = objective(shift=shift, normalizer=normalizer)
    t = torch.ones(BATCH)  # all masked, so that the noise's positions do not matter
    bare = goal(model, x0, seed=SEED, t=t)
    for side in ("left", "right"):
        pad = (n_pad, 0) if side == "left" else (0, n_pad)
        attention_mask = nn.functional.pad(torch.ones_like(x0), pad)
        padded = goal(model, nn.functional.pad(x0, pad, value=9), attention_mask=attention_mask, seed=SEED, t=t)
        torch.testing.assert_close(padded.loss, bare.loss, rtol=1e-5, atol=1e-6)
        assert padded.stats.n_scored == bare.stats.n_scored
        assert not padded.masked[attention_mask == 0].any()


def test_new_steps_and_samples_get_new_noise() -> None:
    model, x0 = adapted(), tokens()
    base = objective()(model, x0, **CALL)
    again = objective()(model, x0, **CALL)
    assert torch.equal(base.loss, again.loss)
    other_step = objective()(model, x0, **(CALL | {"step": STEP + 1}))
    assert torch.equal(other_step.masked, base.masked)
    assert other_step.loss != base.loss, "another attention mask"
    other_samples = objective()(model, x0, sample_index=torch.arange(BATCH) + BATCH, **CALL)
    assert not torch.equal(other_samples.masked, base.masked)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x0": torch.zeros(4, 12)}, TypeError, r"x0 must be a?.*int64\[B, L\], got float32\[4, 12\]"),
        ({"maskable": torch.ones(4, 11, dtype=torch.bool)}, ValueError, r"maskable must be bool\[4, 12\], got"),
        ({"maskable": torch.ones(4, 12)}, TypeError, r"maskable must be bool\[4, 12\], got float32"),
        ({"attention_mask": torch.ones(4, 12)}, TypeError, r"attention_mask must be bool/int64\[4, 12\], got float32"),
        ({"sample_index": torch.arange(3)}, ValueError, r"sample_index must be int64\[4\], got int64\[3\]"),
        ({"t": torch.ones(3)}, ValueError, r"t must be float32\[4\], got float32\[3\]"),
        ({"t": torch.full((4,), 1.5)}, ValueError, r"p_mask must be in \[0, 1\], got 1.5"),
        ({"attn_mask_ratio": -0.1}, ValueError, r"attn_mask_ratio must be in \[0, 1\], got -0.1"),
        ({"normalizer": "mean"}, ValueError, r"normalizer must be one of 'tokens', .*, got 'mean'"),
        ({"seed": 0.5}, TypeError, r"seed must be an int, got 0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    call = {"x0": tokens(), **CALL, **arguments}
    with pytest.raises(error, match=message):
        objective()(adapted(), call.pop("x0"), **call)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask_id": -1}, r"mask_id must be in \[0, .*\], got -1"),
        ({"t_min": 1.0}, r"t_min must be in \[0, 1\), got 1.0"),
        ({"t_min": -0.1}, r"t_min must be in \[0, 1\), got -0.1"),
        ({"strata": -1}, r"strata must be in .*, got -1"),
        ({"normalizer": "mean"}, r"normalizer must be one of .*, got 'mean'"),
        ({"loss_mask": "xt"}, r"loss_mask must be one of 'draw', 'equality', got 'xt'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configs(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**({"mask_id": MASK_ID} | config))


def test_bad_recipes_and_times() -> None:
    with pytest.raises(
        ValueError, match=r"recipe must be one of 'diffullama', 'llada', 'llada_sft', 'dream', got 'mdlm'"
    ):
        ObjectiveConfig.recipe("mdlm", mask_id=1)
    with pytest.raises(TypeError, match=r"mask_id must be an int, got 1\.5"):
        ObjectiveConfig(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sample_index must be a?.*int64\[B\], got float32\[2\]"):
        draw_t(torch.zeros(2), 0)
    with pytest.raises(ValueError, match=r"t_min must be in \[0, 1\), got 2"):
        draw_t(torch.arange(2), 0, t_min=2)


def test_a_recipe_keeps_its_choices() -> None:
    assert ObjectiveConfig.recipe("diffullama", mask_id=3) == ObjectiveConfig(
        mask_id=3, shift=True, t_min=1e-3, strata=0, normalizer="masked", loss_mask="equality"
    )
    assert isinstance(objective()(adapted(), tokens(), **CALL), ObjectiveOutput)
