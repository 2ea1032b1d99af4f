# SPDX-License-Identifier: Apache-2.0
"""Presets, YAML and flags of `diffullama adapt` are one set of settings; a run keeps its own and goes on with it."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
from typing import get_type_hints

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from diffullama_ext.adapt_config import PRESETS, AdaptConfig
from diffullama_ext.objective import ObjectiveConfig

QUICK = ("--steps", 6, "--length", 16, "--batch-size", 4, "--learning-rate", 0.01, "--device", "cpu")

# --- settings ---------------------------------------------------------------------------------------------------------


def test_each_setting_is_a_flag(run):
    text = run("adapt", "--help").output
    for field in dataclasses.fields(AdaptConfig):
        assert f"--{field.name.replace('_', '-')} " in text


def test_yaml_and_flags_mean_the_same(run, models, text_file, tmp_path):
    settings = {"model": str(models / "gpt2"), "data": str(text_file), "steps": 3, "length": 16, "batch-size": 2}
    settings |= {"learning_rate": 1e-3, "shift": False, "mask_token": 7, "objective": {"normalizer": "masked"}}
    settings |= {"data_weight": 2, "device": "cpu"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    flags = ("--model", models / "gpt2", "--data", text_file, "--steps", 3, "--length", 16, "--batch-size", 2)
    flags += ("--learning-rate", "1e-3", "--no-shift", "--mask-token", "7", "--objective", "normalizer=masked")
    flags += ("--data-weight", 2, "--device", "cpu")
    for name, arguments in (("a", ("--config", tmp_path / "settings.yaml")), ("b", flags)):
        result = run("adapt", "--out", tmp_path / name, *arguments)
        assert result.exit_code == 0, result.output
    read = [(tmp_path / name / "run.yaml").read_text() for name in "ab"]
    assert read[0] == read[1]
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert (a.config.mask_token_id, a.config.diffusion["shift"]) == (7, False)


def test_later_sources_win_and_objectives_merge(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "steps: 50\nobjective: {t_min: 0.01}\nlearning-rate: 1e-4\nanneal_steps: 5\nwarmup_steps: 4\n"
    )
    config = AdaptConfig.resolve("diffugpt-s", tmp_path / "a.yaml", {"steps": 60})
    assert (config.steps, config.learning_rate, config.length, config.mask_token) == (60, 1e-4, 512, "10541")
    assert config.objective_config(mask_id=3) == ObjectiveConfig.recipe("diffullama", mask_id=3, t_min=0.01)
    (tmp_path / "b.yaml").write_text(config.to_yaml())
    assert AdaptConfig.resolve(path=tmp_path / "b.yaml") == config


def test_presets_are_the_papers():
    s, m, llama = (AdaptConfig.resolve(name) for name in ("diffugpt-s", "diffugpt-m", "diffullama-7b"))
    assert [(c.steps, c.global_batch_size, c.length) for c in (s, m)] == [(10**6, 256, 512), (160_000, 1280, 1024)]
    for c in (s, m):
        assert (c.learning_rate, c.schedule, c.warmup_steps, c.anneal_steps) == (3e-4, "cosine", 2000, 10_000)
    assert (s.mask_token_or_id(), m.mask_token_or_id(), llama.mask_token_or_id()) == (10541, None, 811)
    assert (llama.learning_rate, llama.adam_beta2, llama.weight_decay, llama.annealing_steps()) == (2e-5, 0.95, 0.1, 0)
    assert llama.accumulation(processes=64) == 4
    assert "quick" in PRESETS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepps": 3}, "no such setting: stepps"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": 0}, r"steps must be in \[1"),
        ({"shift": 1}, "shift must be bool, got 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be in"),
        ({"data": ["a", "b"], "data_weight": [1.0]}, "one weight a source, got 1"),
        ({"objective": {"normaliser": "x"}}, "objective: no such setting: normaliser; it has .* normalizer, recipe, "),
        ({"objective": {"normalizer": "x"}}, "normalizer must be one of"),
        ({"bf16": True, "fp16": True}, "one of bf16 and fp16 must be False"),
        ({"schedule": "square"}, "schedule must be one of"),
        ({"objective": {"mask_id": 3}}, "objective: no such setting: mask_id"),
        ({"objective": {"t_min": "small"}}, "objective t_min must be float, got 'small'"),
        ({"objective": {"recipe": "x"}}, "recipe must be one of 'diffullama', .*, got 'x'"),
        ({"objective": {"shift": False}}, "shift must be given as a setting of its own"),
        ({"objective": {"distill_weight": 0.5}}, "teacher and a distill_weight above 0 need each other, got None and"),
        ({"teacher": "x"}, "need each other, got 'x' and 0"),
        ({"warmup_steps": 11, "steps": 10}, "warmup_steps must be at most steps, got 11 and 10"),
        ({"anneal_steps": 11, "steps": 10}, "anneal_steps must be at most steps, got 11 and 10"),
        ({"data": {"a": 1}}, "data must be a list, got {'a': 1}"),
        ({"data": [["a"]]}, r"data must be str, got \['a'\]"),
        ({"mask_token": ""}, "mask_token must not be empty"),
        ({"column": "text"} | {"isolate_documents": True, "sft": True}, "isolate_documents has no meaning with sft"),
        ({"padding": "exclude"}, "padding has no meaning without sft, got 'exclude'"),
        ({"response_column": "a"}, "response_column has no meaning without sft, got 'a'"),
        ({"lora_alpha": 4}, "lora_alpha has no meaning with lora_rank 0, got 4"),
        ({"lora_dropout": 0.1}, "lora_dropout has no meaning with lora_rank 0, got 0.1"),
        ({"context": "all"}, "context must be one of 'overlap', 'none', got 'all'"),
        ({"padding": "left", "sft": True}, "padding must be one of 'eos', 'exclude', got 'left'"),
        ({"objective": {1: 2}}, "objective: no such setting: 1"),
        ({"accumulate": 3, "global_batch_size": 24}, "accumulate follows from global_batch_size .* got 3 and 24"),
        (
            {"isolate_documents": True, "objective": {"recipe": "dream"}},
            "isolate_documents must be False with loss_weight 'cart'",
        ),
        ({"device": "tpu"}, "device must be one of 'auto', 'cpu', 'cuda', got 'tpu'"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(ValueError, match=message):
        AdaptConfig.resolve(given=given)


BOUNDS = {  # name: (need, below or at the open lower end, above or at the open upper end)
    **{name: ("[1, 2.14748e+09]", 0, 2**31) for name in ("steps", "batch_size", "accumulate", "global_batch_size")},
    **{name: ("[1, 2.14748e+09]", 0, 2**31) for name in ("save_total_limit", "save_steps", "eval_steps")},
    **{name: ("[1, 2.14748e+09]", 0, 2**31) for name in ("logging_steps", "lora_alpha")},
    **{name: ("[0, 2.14748e+09]", -1, 2**31) for name in ("anneal_steps", "warmup_steps", "lora_rank")},
    **{name: ("[0, inf)", -0.1, math.inf) for name in ("weight_decay", "max_grad_norm")},
    "learning_rate": ("(0, inf)", 0.0, math.inf),
    "data_weight": ("(0, inf)", 0.0, math.inf),
    "adam_beta2": ("[0, 1)", -0.1, 1.0),
    "lora_dropout": ("[0, 1)", -0.1, 1.0),
    "heldout": ("(0, 1)", 0.0, 1.0),
    "length": ("[2, 2.14748e+09]", 1, 2**31),
    "seed": ("[0, 4.29497e+09]", -1, 2**32),
}


def test_each_number_has_its_interval():
    kinds = get_type_hints(AdaptConfig)
    numbers = {n for n, kind in kinds.items() if kind in (int, float, int | None, float | None, tuple[float, ...])}
    assert set(BOUNDS) == numbers


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_outside_their_interval(name):
    need, low, high = BOUNDS[name]
    for value in (low, high):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be in {need}, got {value!r}")):
            AdaptConfig.resolve(given={name: value})
    if isinstance(high, float):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be in {need}, got nan")):
            AdaptConfig.resolve(given={name: math.nan})
    wrong = "many" if name != "data_weight" else ["many"]
    with pytest.raises(ValueError, match=f"{name} must be (int|float), got 'many'"):
        AdaptConfig.resolve(given={name: wrong})


def test_the_shift_is_the_users_the_models_or_the_recipes():
    plain, llada = AdaptConfig(), AdaptConfig(objective={"recipe": "llada"})
    assert (plain.shifted(), plain.shifted(False), llada.shifted(), llada.shifted(True)) == (True, False, False, True)
    told = AdaptConfig(shift=True, objective={"recipe": "llada"})
    assert told.shifted(False)
    assert told.objective_config(mask_id=3).shift
    assert not llada.objective_config(mask_id=3).shift


def test_a_global_batch_must_divide():
    with pytest.raises(ValueError, match="multiple of batch_size times processes, got 256, 32 and 3"):
        AdaptConfig.resolve("diffugpt-s").accumulation(processes=3)


def test_files_that_hold_no_settings(fails, tmp_path):
    for text, message in (
        ("a: [", "is not YAML"),
        ("- a", "must hold settings as `name: value`, got list"),
        ("steps: 3\nseed: 1\nsteps: 4\n", "given more than once: steps"),
        ("batch-size: 3\nbatch_size: 4\n", "given more than once: batch_size"),
        ("objective: {t_min: 0.1, t_min: 0.2}\n", "given more than once: t_min"),
        ("step: 3\n", "c.yaml: no such setting: step"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        fails(2, (message,), "adapt", "--out", tmp_path / "out", "--config", tmp_path / "c.yaml")
    fails(2, ("--model must be given",), "adapt", "--out", tmp_path / "out")
    objective = ("adapt", "--out", tmp_path / "out", "--objective")
    for value in ("masked", "t_min=["):
        fails(2, (f"must be key=value, got {value!r}",), *objective, value)
    fails(2, ("each key once, got t_min again in 't_min=.2'",), *objective, "t_min=.1", "--objective", "t_min=.2")


def test_yaml_may_merge_mappings(tmp_path):
    (tmp_path / "c.yaml").write_text("objective: &base {t_min: 0.1}\n<<: {steps: 7}\n")
    config = AdaptConfig.resolve(path=tmp_path / "c.yaml")
    assert (config.steps, config.objective) == (7, {"t_min": 0.1})


# --- the run's folder -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import diffullama_ext.training.trainer as trainer
compute = trainer.DiffusionTrainer.compute_loss
def dying(self, *a, **k):
    return os.kill(os.getpid(), signal.SIGKILL) if self.state.global_step == 5 else compute(self, *a, **k)
trainer.DiffusionTrainer.compute_loss = dying
from diffullama_ext.cli.main import app
app(sys.argv[1:])
"""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # the mask token is new
def test_the_same_command_continues_a_killed_run(run, fails, models, text_file, tmp_path):
    """Bit for bit, LoRA and dropout included; and another command does not."""
    command = ("adapt", "--model", models / "gpt2", "--data", text_file, *QUICK, "--save-steps", 2, "--lora-rank", 2)
    out = tmp_path / "cut"
    code = [sys.executable, "-W", "ignore", "-c", KILLED, *map(str, command), "--out", str(out)]
    assert subprocess.run(code, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert (out / "checkpoint-4").is_dir()
    assert not (out / "config.json").exists()
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__
    assert yaml.safe_load((out / "run.yaml").read_text())["seed"] == 0

    fails(2, ("a run with other settings: seed 0 not 1",), *command, "--out", out, "--seed", 1)
    for folder in (out, tmp_path / "whole"):
        result = run(*command, "--out", folder)
        assert result.exit_code == 0, result.output
    cut, whole = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(p, q) for p, q in zip(cut.parameters(), whole.parameters(), strict=True))
    curves = [json.loads((folder / "curves.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert curves[0] == curves[1]
    assert list(curves[0]) == ["0", "3", "6"]
    bins = curves[0]["6"]["masked_loss_by_bin"]
    assert len(bins) == 8
    assert all(0 < entry["stderr"] < entry["mean"] for entry in bins)
    fails(2, ("holds a finished run",), *command, "--out", out)
