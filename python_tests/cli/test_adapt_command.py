# SPDX-License-Identifier: Apache-2.0
"""`diffullama adapt`, on a model and data of the user's."""

import errno
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

QUICK = ("--steps", 6, "--length", 16, "--batch-size", 4, "--learning-rate", 0.01, "--device", "cpu")


@pytest.fixture(scope="module")
def adapted(run, models, tmp_path_factory):
    """(result, folder) of a short adaptation."""
    root = tmp_path_factory.mktemp("adapted")
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps({"body": f"def f{i}(a):\n    return a\n"}) + "\n" for i in range(120)))
    out = root / "model"
    result = run("adapt", "--model", models / "gpt2", "--data", data, "--column", "body", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    return result, out


def test_the_model_learns_and_is_saved_for_plain_transformers(adapted):
    result, out = adapted
    figures = json.loads((out / "metrics.json").read_text())
    before, after = (figures["models"][name]["diffusion_loss"]["mean"] for name in ("as it was", "adapted"))
    assert after < before - 0.1
    assert f"{after:.3f}" in result.stdout
    assert (figures["length"], figures["anneal_steps"], figures["max_steps"]) == (16, 2, 6)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert model.config.diffusion == {"shift": True, "anneal_steps": 2}
    assert AutoTokenizer.from_pretrained(out).mask_token_id == model.config.mask_token_id


def test_progress_has_the_loss(adapted):
    assert any(line.startswith("adapt: 6 in ") and "loss " in line for line in adapted[0].stderr.splitlines())


def test_options_reach_the_model(run, models, text_file, tmp_path):
    out = tmp_path / "out"
    options = ("--no-shift", "--mask-token", "<hole>", "--anneal-steps", 0, "--steps", 1, "--accumulate", 2)
    result = run("adapt", "--model", models / "gpt2", "--data", text_file, "--out", out, *QUICK[2:], *options)
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained(out).config.diffusion == {"shift": False, "anneal_steps": 0}
    assert AutoTokenizer.from_pretrained(out).mask_token == "<hole>"


def test_weights_are_trained_in_float32(run, models, text_file, tmp_path):
    AutoModelForCausalLM.from_pretrained(models / "gpt2").bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(models / "gpt2").save_pretrained(tmp_path / "half")
    result = run("adapt", "--model", tmp_path / "half", "--data", text_file, "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_a_seed_repeats_the_adaptation(run, models, text_file, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--out", tmp_path / name, "--seed", seed)
        assert run("adapt", "--model", models / "gpt2", "--data", text_file, *QUICK, *options).exit_code == 0
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).transformer.wte.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("nowhere.txt", None, "no such file or folder: "),
        ("empty.txt", b"", "no text in "),
        ("binary.txt", b"\xff\xfe\x00\x01", "is not UTF-8 text (byte 0 is 0xff)"),
        ("broken.jsonl", b'{"text": \n oh', "is not readable as json: "),
        ("other.jsonl", b'{"body": "x"}\n', "has no column 'text'; it has 'body'"),
        ("false.parquet", b"no parquet at all", "is not readable as parquet: "),
        ("short.txt", b"x", "is too short: 1 documents make 2 tokens, one block needs 16"),
        ("block.txt", b"0123456789 123456789", "is too short: 1 block of 16 tokens cannot be split"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_data_that_cannot_be_used(fails, models, tmp_path, name, data, text):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    arguments = ("--model", models / "gpt2", "--data", tmp_path / name, "--out", tmp_path / "out")
    fails(2, (text, name) if "short" not in text else (text,), "adapt", *arguments, *QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(fails, models, text_file, tmp_path):
    text_file.chmod(0)
    arguments = ("--model", models / "gpt2", "--data", text_file, "--out", tmp_path / "out")
    fails(2, ("Permission denied", text_file.name), "adapt", *arguments, *QUICK)


@pytest.mark.parametrize("name", ["bert", "t5", "weights", "nowhere"])
def test_models_that_cannot_be_adapted(fails, models, text_file, tmp_path, name):
    text = {"nowhere": "no such directory", "bert": "missing weights: "}.get(name, "is not a causal language model")
    arguments = ("--model", models / name, "--data", text_file, "--out", tmp_path / "out")
    fails(2, (text,), "adapt", *arguments, *QUICK)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--length", 64), "--length must be at most the model's 32 positions, got 64"),
        (("--anneal-steps", 7), "anneal_steps must be at most steps, got 7 and 6"),
        (("--heldout", 1.5), "heldout must be in (0, 1), got 1.5"),
        (("--mask-token", 5000), "mask_token must be in [0, "),
        (("--objective", "noise=mix", "--objective", "vocab_size=999"), "vocab_size must be within the model's "),
    ],
    ids=["length", "annealing", "share", "mask id", "vocabulary"],
)
def test_options_that_do_not_fit(fails, models, text_file, tmp_path, options, text):
    arguments = ("--model", models / "gpt2", "--data", text_file, "--out", tmp_path / "out")
    fails(2, (text,), "adapt", *arguments, *QUICK, *options)
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_stay_tied_where_the_mask_token_makes_them_longer(run, models, text_file, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(models / "gpt2")
    out = tmp_path / "out"
    assert run("adapt", "--model", models / "gpt2", "--data", text_file, "--out", out, *QUICK).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert before.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(model.lm_head.weight) == model.config.vocab_size == before.config.vocab_size + 1
    assert model.config.mask_token_id == before.config.vocab_size


def test_a_full_disk_at_the_end_leaves_no_half_model(run, models, text_file, tmp_path, monkeypatch):
    """The tokenizer's files, the last to be written, do not fit. The same command then saves from the checkpoint."""
    command = ("adapt", "--model", models / "gpt2", "--data", text_file, *QUICK, "--out")
    save = PreTrainedTokenizerBase.save_pretrained

    def full(self, folder, *arguments, **options):
        if ".model." in str(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, folder, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        result = run(*command, tmp_path / "cut")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {"run.yaml", "environment.json", "curves.json", "checkpoint-5", "checkpoint-6"}
    for name in ("cut", "whole"):
        assert run(*command, tmp_path / name).exit_code == 0
    cut, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("cut", "whole"))
    assert all(torch.equal(p, q) for p, q in zip(cut.parameters(), whole.parameters(), strict=True))


def test_a_run_killed_after_its_model_was_saved_goes_on(run, models, text_file, tmp_path):
    """The tokenizer has a folder among its files: chat templates but the default one."""
    AutoModelForCausalLM.from_pretrained(models / "gpt2").save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    for _ in range(2):
        result = run("adapt", "--model", tmp_path / "model", "--data", text_file, *QUICK, "--out", out)
        assert result.exit_code == 0, result.output
        (out / "metrics.json").unlink()  # as a process that is killed before it writes it
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert not list(out.glob(".*"))


def test_a_folder_with_something_in_it_is_left_alone(fails, models, text_file, tmp_path):
    arguments = ("--model", models / "gpt2", "--data", text_file, "--out", tmp_path)
    fails(2, ("is not empty",), "adapt", *arguments, *QUICK)
