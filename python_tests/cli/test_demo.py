# SPDX-License-Identifier: Apache-2.0
"""`diffullama demo --quick`: the whole path, and what it leaves behind."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def demo(run, tmp_path_factory):
    """(result, run directory) of one quick demo."""
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    result = run("demo", "--quick", "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return result, out


@pytest.fixture(scope="module")
def metrics(demo):
    return json.loads((demo[1] / "metrics.json").read_text(encoding="utf-8"))


def test_adapted_beats_the_model_as_it_is_and_from_scratch(metrics):
    for name in ("AR as it is", "AR, causal", "from scratch"):
        difference = metrics["diffusion_loss_differences"][f"adapted - {name}"]
        assert difference["mean"] < -4 * difference["stderr"], name


def test_the_table_shows_the_figures_of_metrics_json(demo, metrics):
    for name, figures in metrics["models"].items():
        (row,) = [line for line in demo[0].stdout.splitlines() if line.strip().startswith(f"{name} ")]
        loss, accuracy = figures["diffusion_loss"], figures["masked_accuracy"]["0.5"]
        assert f"{loss['mean']:.3f}±{loss['stderr']:.3f}" in row
        assert f"{100 * accuracy['mean']:.1f}±{100 * accuracy['stderr']:.1f}%" in row
        assert "…" not in row


def test_metrics_say_how_to_repeat_the_run(metrics):
    assert metrics["kind"] == "diffullama demo"
    assert metrics["config"]["seed"] == 0
    assert set(metrics["versions"]) >= {"diffullama-ext", "python", "torch", "transformers", "tokenizers"}
    assert metrics["corpus"]["heldout_documents"] > 1
    assert len(metrics["corpus"]["fingerprint"]) == 16
    assert set(metrics["models"]["adapted"]["masked_loss"]) == {"0.15", "0.5", "0.85"}
    assert len(metrics["training_loss"]["train AR"]) == metrics["config"]["ar_steps"]
    assert metrics["seconds"]["train AR"] > 0


def test_plain_transformers_loads_the_model_and_runs_it_bidirectionally(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo[1] / "model")
    model = AutoModelForCausalLM.from_pretrained(demo[1] / "model").eval()
    assert tokenizer.mask_token_id == model.config.mask_token_id
    ids = torch.tensor([[5, 6, 7, 8]])
    changed = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        first, second = (model(input_ids=x).logits[0, 0] for x in (ids, changed))
    assert not torch.equal(first, second)  # row 0 sees the last token


def test_samples_are_there_in_both_forms(demo):
    samples = [json.loads(line) for line in (demo[1] / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {sample["kind"] for sample in samples} == {"sample", "infill"}
    (infilled,) = [sample for sample in samples if sample["kind"] == "infill"]
    assert re.search(r"\[MASK:\d+\]", infilled["prompt"])
    text = (demo[1] / "samples.txt").read_text(encoding="utf-8")
    assert infilled["prompt"] in text
    assert infilled["document"] in demo[0].stdout


def test_progress_goes_to_stderr_a_line_a_stage(demo):
    lines = demo[0].stderr.splitlines()
    assert lines[0].startswith("corpus: ")
    assert any(line.startswith("train from scratch: ") and "loss" in line for line in lines)
    assert "train AR" not in demo[0].stdout


def test_sample_and_infill_take_the_run_directory(run, demo):
    arguments = ("--model", demo[1], "--device", "cpu", "--json")
    sampled = run("sample", *arguments, "--length", 8, "--steps", 4, "-n", 2)
    assert sampled.exit_code == 0, sampled.output
    rows = [json.loads(line) for line in sampled.stdout.splitlines()]
    assert [row["nfe"] for row in rows] == [4, 4]
    filled = run("infill", *arguments, "--text", r"def add(a, b):\n    [MASK:5]\n")
    assert filled.exit_code == 0, filled.output
    text = json.loads(filled.stdout)["text"]
    assert text.startswith("def add(a, b):\n    ")
    assert text.endswith("\n")
    assert "MASK" not in text


def test_other_peoples_folders_are_not_overwritten(fails, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    fails(2, (str(tmp_path), "exists and is not a former demo run"), "demo", "--quick", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here(fails, tmp_path):
    fails(2, ("torch finds no CUDA device",), "demo", "--quick", "--out", tmp_path / "x", "--device", "cuda")


def test_no_such_device(fails, tmp_path):
    fails(
        2, ("--device must be auto, cpu or cuda, got 'abacus'",), "demo", "--out", tmp_path / "x", "--device", "abacus"
    )
