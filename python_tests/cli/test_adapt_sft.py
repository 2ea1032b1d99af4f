# SPDX-License-Identifier: Apache-2.0
"""`diffullama adapt --sft`: prompts and responses, from the files to the trained model and its curves."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from test_adapt_settings import KILLED
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffullama_ext.cli import adapt_curves
from diffullama_ext.integrations import DiffusionConfig

QUICK = ("--sft", "--steps", 6, "--length", 24, "--batch-size", 4, "--learning-rate", 0.01, "--device", "cpu")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", [{"q": f"f{i}(a)", "a": "return a" * (1 + i % 3)} for i in range(60)])


COLUMNS = ("--prompt-column", "q", "--response-column", "a")


def trained(run, out, *arguments):
    result = run("adapt", "--out", out, *QUICK, *arguments)
    assert result.exit_code == 0, result.output
    return result, json.loads((out / "metrics.json").read_text()), AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("padding", ["eos", "exclude"])
def test_an_adapted_model_learns_to_respond(run, adapted_model, pairs, tmp_path, padding):
    """It goes on with its own mask token and shift, bidirectional from the first step."""
    arguments = ("--model", adapted_model, "--data", pairs, *COLUMNS, "--padding", padding)
    result, figures, model = trained(run, tmp_path / "out", *arguments)
    before, after = (figures["models"][name]["diffusion_loss"]["mean"] for name in ("as it was", "adapted"))
    assert after < before - 0.1
    known = DiffusionConfig.of(AutoModelForCausalLM.from_pretrained(adapted_model))
    assert DiffusionConfig.of(model) == DiffusionConfig(known.mask_id, shift=known.shift, anneal_steps=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(adapted_model))
    assert figures["examples"] == {"train": 57, "heldout": 3}
    tokenizer = AutoTokenizer.from_pretrained(adapted_model)
    n_response = [len(tokenizer("return a" * (1 + i % 3))["input_ids"]) + 1 for i in range(57, 60)]
    n_prompt = [len(tokenizer(f"f{i}(a)")["input_ids"]) + 1 for i in range(57, 60)]  # with a bos
    scored = sum(n_response) if padding == "exclude" else sum(24 - n for n in n_prompt)
    assert f"Held out: {scored} tokens in 3 examples" in " ".join(result.stdout.split())
    log = json.loads((sorted((tmp_path / "out").glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())
    assert all(entry["attn_mask_ratio"] == 1.0 for entry in log["log_history"] if "attn_mask_ratio" in entry)


def test_any_other_model_is_annealed_first(run, models, pairs, tmp_path):
    _, figures, model = trained(run, tmp_path / "out", "--model", models / "gpt2", "--data", pairs, *COLUMNS)
    assert (figures["anneal_steps"], model.config.diffusion["anneal_steps"]) == (2, 2)


def test_chats_take_the_tokenizers_template(run, fails, adapted_model, tmp_path):
    chat = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "return a + b"}]
    data = write_rows(tmp_path / "chats.jsonl", [{"talk": chat}] * 20)
    arguments = ("--data", data, "--messages-column", "talk")
    fails(2, ("tokenizer has no chat_template, which the chats of", "chats.jsonl"), "adapt", "--model", adapted_model,
          *arguments, *QUICK, "--out", tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()
    tokenizer = AutoTokenizer.from_pretrained(adapted_model)
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_pretrained(adapted_model).save_pretrained(tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    trained(run, tmp_path / "out", "--model", tmp_path / "chatty", *arguments)


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([{"prompt": "x"}] * 3, (), "needs 'messages', or texts 'prompt' and 'response'; it holds prompt (str)"),
        ([{"q": "x", "a": "y"}] * 3, ("--prompt-column", "q"), "'messages', or texts 'q' and 'response'"),
        ([{"prompt": "x " * 40, "response": "y"}] * 3, (), "has no example that fits: 3 rows, 3 of them with a prompt"),
        ([{"prompt": "x", "response": "y"}], (), "is too short: 1 example cannot be split"),
        ([], (), "has no example that fits: 0 rows"),
        ([{"prompt": "x", "response": "y"}] * 3, ("--padding", "left"), "padding must be one of 'eos', 'exclude'"),
        ([{"prompt": "x", "response": "y"}] * 3, ("--column", "x"), "column has no meaning with sft, got 'x'"),
    ],
)
def test_rows_that_cannot_be_used(fails, adapted_model, tmp_path, rows, options, text):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ("--model", adapted_model, "--data", data, "--out", tmp_path / "out")
    fails(2, (text,), "adapt", *arguments, *QUICK, *options)
    assert not (tmp_path / "out").exists()


def test_text_has_no_rows(fails, adapted_model, text_file, tmp_path):
    arguments = ("--model", adapted_model, "--data", text_file, "--out", tmp_path / "out")
    fails(2, (f"{text_file} has no rows",), "adapt", *arguments, *QUICK)


def test_each_source_has_its_share_of_what_is_scored_on(run, adapted_model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_curves, "HELDOUT_EXAMPLES", 8)
    other = write_rows(tmp_path / "other.jsonl", [{"q": "class", "a": "n = 0"}] * 60)
    seen = []
    whole = adapt_curves.heldout_batch
    monkeypatch.setattr("diffullama_ext.cli.adapt_run.heldout_batch", lambda *a: seen.append(whole(*a)) or seen[0])
    arguments = ("--model", adapted_model, "--data", pairs, "--data", other, *COLUMNS, "--heldout", 0.5)
    _, figures, _ = trained(run, tmp_path / "out", *arguments, "--data-weight", 0.75, "--data-weight", 0.25)
    assert figures["examples"] == {"train": 120, "heldout": 8}  # 30 rows of the small share, 90 of the other
    starts = [AutoTokenizer.from_pretrained(adapted_model).decode(row[1:]) for row in seen[0]["blocks"]]
    assert [text.startswith("class") for text in starts] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("padding", ["eos", "exclude"])
def test_a_killed_run_goes_on(run, adapted_model, pairs, tmp_path, padding):
    command = ("adapt", "--model", adapted_model, "--data", pairs, *COLUMNS, *QUICK, "--save-steps", 2)
    command += ("--padding", padding)
    code = [sys.executable, "-W", "ignore", "-c", KILLED, *map(str, command), "--out", str(tmp_path / "cut")]
    assert subprocess.run(code, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    for name in ("cut", "whole"):
        assert run(*command, "--out", tmp_path / name).exit_code == 0
    cut, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("cut", "whole"))
    assert all(torch.equal(p, q) for p, q in zip(cut.parameters(), whole.parameters(), strict=True))
    assert (tmp_path / "cut" / "curves.json").read_text() == (tmp_path / "whole" / "curves.json").read_text()
