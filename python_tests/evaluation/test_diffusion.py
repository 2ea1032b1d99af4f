# SPDX-License-Identifier: Apache-2.0
"""Held-out figures of adapted models against a dense, token-by-token computation; and that the noise is fixed."""

import math

import pytest
import torch
from tiny_models import FAMILIES, MASK_ID, VOCAB, causal_lm
from torch.nn import functional as F

from diffullama_ext import AttentionMask, mask_tokens
from diffullama_ext.evaluation import EvaluationConfig, diffusion_scores
from diffullama_ext.evaluation import diffusion as module
from diffullama_ext.integrations import adapt
from diffullama_ext.objective import draw_t

TIMES = (0.3, 0.8)
CONFIG = EvaluationConfig(draws=3, times=TIMES, seed=5, batch_size=4)


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(8, VOCAB, (6, 10), dtype=torch.int32)


def adapted(family: str = "gpt2", shift: bool = True):
    return adapt(causal_lm(family), mask_token=MASK_ID, shift=shift)


def dense(model, blocks, config, shift, diffusion_mask=None) -> dict:
    """Full logits, a Python loop over masked tokens."""
    x0 = blocks.long()

    def sums(index, t):
        """[(nll, hits, count)] of each sequence."""
        drawn = mask_tokens(x0, t, mask_id=MASK_ID, seed=config.seed, sample_index=index)
        with torch.no_grad():
            logits = model(input_ids=drawn.xt, diffusion_mask=diffusion_mask).logits.double()
        out = []
        for b in range(len(x0)):
            places = [j for j in range(x0.shape[1]) if drawn.masked[b, j] and (j > 0 or not shift)]
            rows = [logits[b, j - 1 if shift else j] for j in places]
            nll = sum(float(F.cross_entropy(row, x0[b, j])) for row, j in zip(rows, places, strict=True))
            hits = sum(int(row.argmax()) == int(x0[b, j]) for row, j in zip(rows, places, strict=True))
            out.append((nll, hits, len(places)))
        return out

    number = torch.arange(len(x0))
    elbo = 0.0
    for draw in range(config.draws):
        index = number * config.draws + draw
        t = draw_t(index, config.seed, t_min=config.t_min, strata=config.draws)
        elbo += sum(nll / float(level) for (nll, _, _), level in zip(sums(index, t), t, strict=True))
    figures = {"elbo": elbo / (config.draws * len(x0) * (x0.shape[1] - int(shift)))}
    for level in config.times:
        at = sums(number, torch.full((len(x0),), level))
        count = sum(n for _, _, n in at)
        figures[level] = (sum(nll for nll, _, _ in at) / count, sum(hits for _, hits, _ in at) / count)
    return figures


def assert_same(scores, figures) -> None:
    assert scores.diffusion_loss.mean == pytest.approx(figures["elbo"], rel=1e-5)
    for level in TIMES:
        assert scores.masked_loss[level].mean == pytest.approx(figures[level][0], rel=1e-5)
        assert scores.masked_accuracy[level].mean == pytest.approx(figures[level][1])


@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_dense_computation(family, shift, blocks):
    model = adapted(family, shift)
    scores = diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=shift)
    assert_same(scores, dense(model, blocks, CONFIG, shift))


def test_the_bins_of_t_are_those_that_the_draws_fall_in(blocks):
    config = EvaluationConfig(draws=4, seed=3)
    bins = diffusion_scores(adapted(), blocks, config, mask_id=MASK_ID, shift=True).masked_loss_by_bin
    index = torch.arange(len(blocks))
    for draw, (low, high) in enumerate(bins):
        t = draw_t(index * 4 + draw, 3, t_min=config.t_min, strata=4)
        assert low - 1e-6 <= t.min() <= t.max() <= high + 1e-6
    assert sum(high - low for low, high in bins) == pytest.approx(1 - config.t_min)
    model = adapted()  # one bin is the plain mean over all masked tokens of its draw
    (only,) = diffusion_scores(
        model, blocks, EvaluationConfig(draws=1), mask_id=MASK_ID, shift=True
    ).masked_loss_by_bin.values()
    t = draw_t(index, 0)
    noised = mask_tokens(blocks.long(), t, mask_id=MASK_ID, seed=0, sample_index=index)
    logits = model(noised.xt).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), blocks[:, 1:].long(), reduction="none")
    assert only.mean == pytest.approx(nll[noised.masked[:, 1:]].mean().item(), rel=1e-5)


def test_attends_as_it_is_told(blocks):
    model, causal = adapted(), AttentionMask.causal(10)
    scores = diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=True, diffusion_mask=causal)
    assert_same(scores, dense(model, blocks, CONFIG, True, causal))
    free = diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=True)
    assert abs(scores.diffusion_loss.mean - free.diffusion_loss.mean) > 1e-3


def test_softcapped_logits(blocks):
    model = adapted()
    model.config.final_logit_softcapping = 0.5
    capped = diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=True)
    low, high = math.log(VOCAB) - 1.0, math.log(VOCAB) + 1.0  # no logit is outside [-0.5, 0.5]
    assert all(low < estimate.mean < high for estimate in capped.masked_loss.values())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_change_nothing(batch_size, blocks):
    model = adapted()
    config = EvaluationConfig(draws=3, times=TIMES, seed=5, batch_size=batch_size)
    one, two = (diffusion_scores(model, blocks, c, mask_id=MASK_ID, shift=True) for c in (CONFIG, config))
    torch.testing.assert_close(one.diffusion_loss.residuals, two.diffusion_loss.residuals, rtol=1e-4, atol=1e-7)
    assert one.masked_accuracy == two.masked_accuracy


def test_chunks_of_logits_change_nothing(blocks, monkeypatch):
    model = adapted()
    whole = diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=True)
    monkeypatch.setattr(module, "LOGITS_ALIVE", 2 * VOCAB)
    chunked = diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=True)
    assert chunked.diffusion_loss.mean == pytest.approx(whole.diffusion_loss.mean, rel=1e-6)
    assert chunked.masked_accuracy == whole.masked_accuracy


def test_models_see_the_same_noise_and_seeds_differ(blocks):
    def inputs(model, config):
        seen = []
        hook = model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        diffusion_scores(model, blocks, config, mask_id=MASK_ID, shift=True)
        hook.remove()
        return torch.cat(seen)

    first = inputs(adapted("gpt2"), CONFIG)
    assert torch.equal(first, inputs(adapted("llama"), CONFIG))
    assert not torch.equal(first, inputs(adapted("gpt2"), EvaluationConfig(draws=3, times=TIMES, seed=6, batch_size=4)))


@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
def test_a_uniform_model_costs_log_vocabulary(shift):
    """The ELBO of the uniform model is log V a token, whatever t: the 1/t weights are unbiased."""
    model = adapted("gpt2", shift)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    blocks = torch.randint(8, VOCAB, (300, 10))
    scores = diffusion_scores(model, blocks, EvaluationConfig(batch_size=300), mask_id=MASK_ID, shift=shift)
    elbo = scores.diffusion_loss
    assert abs(elbo.mean - math.log(VOCAB)) < 4 * elbo.stderr < 0.5
    for estimate in scores.masked_loss.values():
        assert estimate.mean == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_a_model_that_knows_the_only_text_is_always_right():
    model = adapted("qwen2", shift=False)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
        head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
        head.bias[11] = 50.0
    scores = diffusion_scores(model, torch.full((5, 8), 11), CONFIG, mask_id=MASK_ID, shift=False)
    assert [estimate.mean for estimate in scores.masked_accuracy.values()] == [1.0, 1.0]
    assert scores.diffusion_loss.mean == pytest.approx(0.0, abs=1e-6)


def test_real_tokens_with_the_mask_id_are_not_masked(blocks):
    """What counts is the draw, not equality with the mask id."""
    blocks[:, 4] = MASK_ID
    model = adapted()
    scores = diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=True)
    assert_same(scores, dense(model, blocks, CONFIG, True))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_no_gradient_is_kept(training, blocks):
    model = adapted().train(training)
    diffusion_scores(model, blocks, CONFIG, mask_id=MASK_ID, shift=True)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reports_progress_and_serialises(blocks):
    seen = []
    scores = diffusion_scores(
        adapted(), blocks, CONFIG, mask_id=MASK_ID, shift=True, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]
    figures = scores.to_dict()
    assert set(figures) == {"diffusion_loss", "masked_loss", "masked_accuracy", "masked_loss_by_bin"}
    assert figures["masked_loss"]["0.3"]["mean"] == scores.masked_loss[0.3].mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be in .*, got 0"),
        ({"draws": 1.5}, "draws must be an int, got 1.5"),
        ({"batch_size": 0}, "batch_size must be in .*, got 0"),
        ({"t_min": 0.0}, r"t_min must be in \(0, 1\], got 0.0"),
        ({"times": (0.5, 1.5)}, r"times must be in \(0, 1\], got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_rejects(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EvaluationConfig(**options)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, r"blocks must be at least \[1, 2\], got \[0, 4\]"),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError, r"blocks must be at least \[1, 2\], got \[4, 1\]"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"blocks must be int32/int64\[N, L\]"),
        (torch.zeros(4, 4), TypeError, r"blocks must be int32/int64\[N, L\], got float32"),
    ],
    ids=["none", "one-token", "1-D", "float"],
)
def test_rejects_blocks(blocks, error, message):
    with pytest.raises(error, match=message):
        diffusion_scores(adapted(), blocks, mask_id=MASK_ID, shift=True)
