# SPDX-License-Identifier: Apache-2.0
"""A whole run in seconds: repeatable, and the comparison is what it says."""

import dataclasses

import pytest
import torch

from diffullama_ext.demo import DemoConfig, pipeline, run_demo
from diffullama_ext.integrations import DiffusionConfig

TINY = dataclasses.replace(
    DemoConfig.preset("quick"), ar_steps=3, diffusion_steps=2, anneal_steps=1, heldout_blocks=4, draws=2, width=32
)


@pytest.fixture(scope="module")
def run():
    return run_demo(TINY)


def test_the_same_config_gives_the_same_figures(run):
    again = run_demo(TINY)
    assert again.training_loss == run.training_loss
    assert again.scores == run.scores
    assert again.samples == run.samples
    assert again.infilled == run.infilled


def test_another_seed_gives_another_run(run):
    assert run_demo(dataclasses.replace(TINY, seed=1)).training_loss != run.training_loss


def test_both_diffusion_trainings_see_the_same_batches_behind_the_autoregressive_ones(monkeypatch):
    seen = {}

    def fit(model, samples, loss_of, **options):
        key = len(seen)
        seen[key] = [samples.batch(step, options["batch_size"]) for step in range(options["steps"])]
        return [0.0]

    monkeypatch.setattr(pipeline, "fit", fit)
    pipeline.run_demo(TINY)
    ar, adapted, scratch = seen.values()
    for (x0, index), (other_x0, other_index) in zip(adapted, scratch, strict=True):
        assert torch.equal(x0, other_x0)
        assert torch.equal(index, other_index)
    assert int(adapted[0][1][0]) == int(ar[-1][1][-1]) + 1


def test_training_from_scratch_starts_from_the_weights_before_autoregressive_training(monkeypatch):
    starts = []

    def fit(model, *args, **options):
        starts.append({name: value.clone() for name, value in model.state_dict().items()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        return [0.0]

    monkeypatch.setattr(pipeline, "fit", fit)
    pipeline.run_demo(TINY)
    ar, adapted, scratch = starts
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(ar[name], scratch[name])
    torch.testing.assert_close(adapted[name], ar[name] + 1)
    assert len(scratch["transformer.wte.weight"]) == len(ar["transformer.wte.weight"]) + 1  # the mask token


def test_what_a_run_holds(run):
    assert set(run.scores) == {"AR as it is", "AR, causal", "adapted", "from scratch"}
    assert run.heldout.shape == (4, 32)
    assert run.model.config.vocab_size == len(run.tokenizer) <= TINY.vocab_size
    assert DiffusionConfig.of(run.model) == DiffusionConfig(len(run.tokenizer) - 1, True, 1)
    assert [len(losses) for losses in run.training_loss.values()] == [3, 2, 2]
    assert len(run.samples) == len(run.infilled) == 1
    assert "<|mask|>" not in run.samples[0]
    assert all(seconds > 0 for seconds in run.seconds.values())


def test_the_two_rows_of_the_autoregressive_model_differ_in_attention_only(run):
    free, causal = run.scores["AR as it is"], run.scores["AR, causal"]
    assert free.ar_loss == causal.ar_loss
    assert free.diffusion.diffusion_loss != causal.diffusion.diffusion_loss
    assert run.difference("AR, causal").mean == pytest.approx(
        run.scores["adapted"].diffusion.diffusion_loss.mean - causal.diffusion.diffusion_loss.mean
    )


def test_reports_every_stage_to_its_end():
    seen = {}
    run_demo(TINY, report=lambda stage, done, total, note: seen.setdefault(stage, []).append((done, total)))
    assert list(seen)[:3] == ["corpus", "tokenizer", "train AR"]
    for steps in seen.values():
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
