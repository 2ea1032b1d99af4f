# SPDX-License-Identifier: Apache-2.0
"""Every variant of the objective against its formula in loops, and what holds for all of them."""

import math
from typing import Any

import oracles
import pytest
import torch
from objective_cases import BATCH, LENGTH, SEED, adapted, assert_same_gradients, gradients, objective, tokens
from objective_oracle import VARIANTS, block_nll, views
from tiny_models import MASK_ID
from torch import Tensor, nn

from diffullama_ext import shifted_cross_entropy
from diffullama_ext.objective import ObjectiveConfig
from diffullama_ext.objective.noising import context_weight, noise, token_weight

INDEX = [5, 2, 2**35 + 1, 4]
NORMALIZERS = ("tokens", "masked", "sequence", "batch")
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
each_shift = pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])


def prompts() -> Tensor:
    """[B, L] bool maskable: prompts of several lengths, one of them everything but a token."""
    return torch.arange(LENGTH) >= torch.tensor([[0], [3], [5], [11]])


# --- the formula ------------------------------------------------------------------------------------------------------


@each_variant
@each_shift
@pytest.mark.parametrize("normalizer", ["tokens", "sequence"])
def test_the_loss_is_the_formula(variant: dict[str, Any], shift: bool, normalizer: str) -> None:
    model, x0, maskable = adapted(), tokens(), prompts()
    goal = objective(shift=shift, normalizer=normalizer, **variant)
    out = goal(model, x0, maskable=maskable, seed=SEED, sample_index=torch.tensor(INDEX))
    out.loss.backward()
    got = gradients(model)
    model.zero_grad()

    expected, n_scored = torch.zeros(()), 0
    every = views(goal.config, x0, maskable, INDEX, SEED)
    noised = torch.cat([view.noised for view in every])
    per_sequence = oracles.denominator(normalizer, noised, maskable.repeat(len(every), 1), shift)
    for number, view in enumerate(every):
        if goal.config.block_length is None:
            logits = model(view.xt).logits  # an adapted model is bidirectional
            nll = oracles.dense_nll(logits, x0, view.noised, shift)
        else:
            nll = block_nll(model, view.xt, x0, view.noised, shift, goal.config.block_length)
        shares = torch.tensor(per_sequence[BATCH * number : BATCH * (number + 1)])
        expected = expected + ((view.weight * nll).sum(dim=1) / shares).sum()
        n_scored += int(view.noised[:, int(shift) :].sum())
    expected.backward()
    assert n_scored > 0
    assert out.stats.n_scored == n_scored
    t = torch.tensor([row for view in every for row in view.t])
    torch.testing.assert_close(out.t.reshape(t.shape), t, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(got, gradients(model))


def test_context_weights_of_long_sequences() -> None:
    """Longer than the reach of the kernel, beside every pair summed."""
    visible = torch.rand(2, 700) < 0.5
    place = torch.arange(700)
    distance = (place[:, None] - place).abs().double()
    for p in (0.05, 0.3, 0.999):
        kernel = 0.5 * p * (1 - p) ** (distance - 1)
        kernel.fill_diagonal_(0.0)
        torch.testing.assert_close(
            context_weight(visible, p), (visible.double() @ kernel).float(), rtol=1e-5, atol=1e-6
        )
    assert context_weight(torch.ones(1, 1, dtype=torch.bool), 0.3).tolist() == [[0.0]]


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS.values() if "loss_weight" not in v and "noise" not in v], ids=str
)
def test_weights_make_the_elbo(variant: dict[str, Any]) -> None:
    """E[weight * noised] = 1 for every token, averaged over the views: each counts as the bound counts it."""
    config = ObjectiveConfig(MASK_ID, **{"t_min": 0.05} | variant)
    n, length = 12_000, 7
    x0 = torch.zeros(n, length, dtype=torch.int64)
    maskable = torch.arange(length).expand(n, -1) != 2
    noised = noise(config, x0, maskable, SEED, torch.arange(n), None, config.block_length)
    value = token_weight(config, noised, torch.ones_like(maskable)) * noised.noised
    value = value.reshape(config.n_views, n, length).mean(dim=0)
    assert not value[:, 2].any()
    value = value[:, torch.arange(length) != 2]
    error = value.std(dim=0) / n**0.5
    assert ((value.mean(dim=0) - 1).abs() < 5 * error).all()


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if not v.get("block_length")], ids=str)
def test_the_noised_batch_gives_the_loss_to_a_loop_of_its_own(variant: dict[str, Any]) -> None:
    model, x0, goal = adapted(), tokens(), objective(normalizer="sequence", **variant)
    given = {"maskable": prompts(), "seed": SEED, "sample_index": torch.tensor(INDEX)}
    batch = goal.noise(x0, **given)
    logits = model(batch.xt).logits
    loss, stats = shifted_cross_entropy(
        logits,
        batch.x0,
        batch.scored,
        loss_weight=batch.loss_weight,
        maskable=batch.scorable,
        normalizer="sequence",
    )
    out = goal(model, x0, **given)
    torch.testing.assert_close(loss, out.loss)
    assert stats.n_scored == out.stats.n_scored


# --- two views of one draw --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_count", [False, True])
@pytest.mark.parametrize("block_length", [None, 4])
def test_complementary_views_mask_each_token_once(exact_count: bool, block_length: int | None) -> None:
    config = ObjectiveConfig(MASK_ID, views="complementary", exact_count=exact_count, block_length=block_length)
    noised = noise(config, tokens(), prompts(), SEED, torch.tensor(INDEX), None, block_length)
    first, second = noised.noised.chunk(2)
    assert torch.equal(first ^ second, prompts())
    assert torch.equal(first | second, prompts())


@pytest.mark.parametrize("more", [{}, {"exact_count": True}, {"noise": "mix", "vocab_size": 61}], ids=str)
def test_nested_views_are_nested(more: dict[str, Any]) -> None:
    config = ObjectiveConfig(MASK_ID, views="nested", **more)
    x0 = torch.randint(61, (200, LENGTH))
    noised = noise(config, x0, torch.ones_like(x0, dtype=torch.bool), SEED, torch.arange(200), None, None)
    (less, more_noised), (lower, higher) = noised.noised.chunk(2), noised.t.chunk(2)
    assert (lower <= higher).all()
    if config.noise == "mask":
        assert (less <= more_noised).all()
    assert less.sum() < more_noised.sum()


def test_exact_counts_are_exact() -> None:
    config = ObjectiveConfig(MASK_ID, exact_count=True, shift=False)
    n, length = 3000, 8
    x0 = torch.zeros(n, length, dtype=torch.int64)
    noised = noise(config, x0, torch.ones_like(x0, dtype=torch.bool), SEED, torch.arange(n), None, None)
    counts = noised.noised.sum(dim=1)
    assert torch.equal(counts, torch.ceil(noised.t.double() * length).long())
    share = torch.bincount(counts, minlength=length + 1)[1:] / n  # uniform over 1..L, as LLaDA's likelihood draws it
    assert (share - 1 / length).abs().max() < 5 * (1 / length / n) ** 0.5


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_mixed_noise_has_its_rates_and_draws_every_token_but_the_mask(t: float) -> None:
    config = ObjectiveConfig(MASK_ID, noise="mix", vocab_size=11)
    n, length = 500, 400
    x0 = torch.full((n, length), 3)
    noised = noise(config, x0, torch.ones_like(x0, dtype=torch.bool), SEED, torch.arange(n), torch.full((n,), t), None)
    phi = math.pi / 2 * t
    to_random = math.sin(phi) + math.cos(phi) - 1
    expected = {MASK_ID: 1 - math.cos(phi)} | {i: to_random / 10 for i in range(11) if i != MASK_ID}
    expected[3] += 1 - math.sin(phi)
    for token, p in expected.items():
        share = (noised.xt == token).double().mean().item()
        assert abs(share - p) <= 5 * (p * (1 - p) / x0.numel()) ** 0.5 + 1e-9
    assert torch.equal(noised.noised, noised.xt != 3)


# --- invariants of all ------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_no_split_of_the_batch_changes_anything(variant: dict[str, Any], normalizer: str) -> None:
    model, x0, maskable, index = adapted(), tokens(), prompts(), torch.tensor(INDEX)
    goal = objective(normalizer=normalizer, **variant)
    call = {"seed": SEED, "step": 3, "attn_mask_ratio": 0.4}
    whole = goal(model, x0, maskable=maskable, sample_index=index, **call)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    total, loss = 0, 0.0
    parts = [torch.tensor([3, 0]), torch.tensor([2]), torch.tensor([1])]
    for part in parts:
        given = {"maskable": maskable[part], "sample_index": index[part]}
        total += goal.denominator(x0[part], seed=SEED, step=3, **given)
    assert total == goal.denominator(x0, maskable=maskable, sample_index=index, seed=SEED, step=3)
    for part in parts:
        if normalizer == "sequence":  # a sequence's own share is in the sums of this normaliser
            out = goal(model, x0[part], maskable=maskable[part], sample_index=index[part], **call)
        else:
            out = goal(model, x0[part], maskable=maskable[part], sample_index=index[part], normalizer=1.0, **call)
        share = out.stats.weighted_sum / total
        share.backward()
        loss += share.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert_same_gradients(gradients(model), expected)


@each_variant
def test_what_may_not_be_noised_never_is(variant: dict[str, Any]) -> None:
    config = ObjectiveConfig(MASK_ID, **variant)
    x0, maskable = tokens(), prompts()
    noised = noise(config, x0, maskable, SEED, torch.tensor(INDEX), None, config.block_length)
    kept = ~maskable.repeat(config.n_views, 1)
    assert not noised.noised[kept].any()
    assert torch.equal(noised.xt[kept], x0.repeat(config.n_views, 1)[kept])
    assert torch.equal(
        noised.xt != x0.repeat(config.n_views, 1), noised.noised & (noised.xt != x0.repeat(config.n_views, 1))
    )


@each_variant
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_batch_with_nothing_maskable_is_zero_and_counted(variant: dict[str, Any], normalizer: str) -> None:
    model, x0 = adapted(), tokens()
    goal = objective(normalizer=normalizer, **variant)
    nothing = torch.zeros_like(x0, dtype=torch.bool)
    for count in (1, 2):
        with pytest.warns(
            UserWarning, match=rf"no token that may be masked and scored; its loss is 0 \({count} so far"
        ):
            out = goal(model, x0, maskable=nothing, seed=SEED)
        assert out.loss == 0
        out.loss.backward()
    goal(model, x0, maskable=nothing, seed=SEED)  # the third says nothing
    assert goal.n_empty_batches == 3
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    goal(model, x0, seed=SEED)
    assert goal.n_empty_batches == 3


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if not v.get("strata")], ids=str)
def test_padding_changes_nothing(variant: dict[str, Any]) -> None:
    """On the right, where positions keep their noise. (Strata over blocks depend on the number of blocks.)"""
    model, x0 = adapted(), tokens()
    goal = objective(**variant)
    bare = goal(model, x0, seed=SEED)
    attention_mask = nn.functional.pad(torch.ones_like(x0), (0, 6))
    padded = goal(model, nn.functional.pad(x0, (0, 6), value=9), attention_mask=attention_mask, seed=SEED)
    torch.testing.assert_close(padded.loss, bare.loss, rtol=1e-5, atol=1e-6)
    assert padded.stats.n_scored == bare.stats.n_scored


@each_variant
def test_given_levels_are_used(variant: dict[str, Any]) -> None:
    """The levels that one call drew, given to another sample number, are the levels there."""
    model, x0, goal = adapted(), tokens(), objective(**variant)
    drawn = goal(model, x0, seed=SEED).t
    given = drawn[:BATCH] if goal.config.views == "complementary" else drawn
    out = goal(model, x0, seed=SEED + 1, t=given)
    assert torch.equal(out.t, drawn)
    with pytest.raises(ValueError, match=r"t must be float32\["):
        goal(model, x0, seed=SEED, t=given[:-1])


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"t_max": 1e-4}, r"t_max must be in \(t_min, 1\], got 0.0001 with t_min 0.001"),
        ({"t_max": 1.5}, r"t_max must be in \(t_min, 1\], got 1.5"),
        ({"strata": 2, "antithetic": True}, "antithetic and strata=2 exclude each other"),
        ({"loss_weight": "1/t"}, "loss_weight must be one of 'elbo', 'uniform', 'cart', got '1/t'"),
        ({"cart_p": 1.0}, r"cart_p must be in \(0, 1\), got 1.0"),
        ({"views": "two"}, "views must be one of 'single', 'nested', 'complementary', got 'two'"),
        ({"noise": "uniform"}, "noise must be one of 'mask', 'mix', got 'uniform'"),
        ({"noise": "mix"}, "vocab_size must be given with noise='mix'"),
        ({"noise": "mix", "vocab_size": 1}, r"vocab_size must be in \[2, .*\], got 1"),
        (
            {"noise": "mix", "vocab_size": 9, "views": "complementary"},
            "views='complementary' has no meaning with noise",
        ),
        ({"noise": "mix", "vocab_size": 9, "exact_count": True}, "exact_count=True has no meaning with noise='mix'"),
        ({"noise": "mix", "vocab_size": 9, "loss_mask": "equality"}, "loss_mask='equality' has no meaning with noise"),
        ({"block_length": 0}, r"block_length must be in \[1, .*\], got 0"),
        ({"block_length_start": 4}, "block_length must be given with block_length_start=4"),
        ({"block_length": 12, "block_length_start": 4, "block_length_steps": 9}, r"start \* 2\^n, got 12 and 4"),
        ({"block_length": 4, "block_length_start": 8, "block_length_steps": 9}, r"start \* 2\^n, got 4 and 8"),
        ({"block_length": 8, "block_length_start": 4}, "block_length_steps must be 0 exactly where the length stays"),
        ({"block_length": 8, "block_length_steps": 4}, "block_length_steps must be 0 exactly where the length stays"),
        ({"teacher_block_length": 4}, "block_length must be given with teacher_block_length=4"),
        ({"teacher_shift": True, "shift": False}, "teacher_shift must be False without shift"),
        ({"distill_weight": -1.0}, r"distill_weight must be in \[0, inf\], got -1.0"),
        ({"distill_top_k": 0}, r"distill_top_k must be in \[1, .*\], got 0"),
        ({"distill_temperature": 0.0}, r"distill_temperature must be in \(0, inf\], got 0.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_configs_that_make_no_sense(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(MASK_ID, **config)


def test_dreams_recipe_and_changes_to_one() -> None:
    assert ObjectiveConfig.recipe("dream", mask_id=3) == ObjectiveConfig(3, loss_weight="cart", cart_p=0.3)
    assert ObjectiveConfig.recipe("llada", mask_id=3, t_min=0.5) == ObjectiveConfig(3, shift=False, t_min=0.5)
