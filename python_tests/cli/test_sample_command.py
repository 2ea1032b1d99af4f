# SPDX-License-Identifier: Apache-2.0
"""`diffullama sample` and `diffullama infill`: options, policies, pages, batches that resume."""

import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffullama_ext.cli import sampling_run
from diffullama_ext.cli.policy_option import parse_policy
from diffullama_ext.integrations import prepare
from diffullama_ext.sampling import POLICIES, ConfidencePolicy, ThresholdPolicy, generate

PROMPTS = [r'{"prompt": "def add(", "id": "a"}', r'{"prompt": "class Counter:\n    n"}', "", "{}", '{"prompt": null}']


@pytest.fixture
def sample(run, adapted_model):
    """(options...) -> result of `sample` with the tiny model and texts of 6 tokens."""
    return lambda *options: run("sample", "--model", adapted_model, "--device", "cpu", "--length", 6, *options)


@pytest.fixture
def infill(run, adapted_model):
    return lambda *options: run("infill", "--model", adapted_model, "--device", "cpu", *options)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(PROMPTS))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sampling_continues_a_prompt_and_repeats_by_seed(sample):
    texts = [sample("--prompt", r"def f1(a):\n", "--length", 8, "--seed", seed).stdout for seed in (3, 3, 4)]
    assert texts[0].startswith("def f1(a):\n")
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "options", [("--policy", "random", "--steps", 3), ("--policy", "threshold:threshold=0.5"), ("--top-k", 5)]
)
def test_several_texts(sample, options):
    result = sample("-n", 2, "--block-length", 3, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("--- ") == 2


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_by_name(sample, name):
    result = sample("--policy", name, "--steps", 4, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["nfe"] <= 6


def test_policies_are_parsed_into_their_parameters():
    assert parse_policy("threshold") == ThresholdPolicy()
    assert parse_policy("threshold:threshold=0.5, confidence=sample_prob") == ThresholdPolicy(0.5, "sample_prob")
    assert parse_policy("confidence:noise=1") == ConfidencePolicy(noise=1.0)


def test_help_lists_every_policy_with_its_parameters(run):
    for command in ("sample", "infill"):
        text = " ".join(run(command, "--help").stdout.split())
        assert "threshold:threshold=0.9,confidence=prob Commit every position at least this confident" in text
        for name in POLICIES:
            assert re.search(rf"\b{name}\b", text)


def test_infilling_keeps_both_sides_and_escapes_can_be_off(infill):
    escaped = infill("--text", r"def f(a):\n\t[MASK:3] \\n end")
    assert escaped.exit_code == 0, escaped.output
    assert escaped.stdout.startswith("def f(a):\n\t")
    assert escaped.stdout.endswith(" \\n end\n")
    raw = infill("--no-escapes", "--text", r"def f(a):\n[MASK:3]")
    assert raw.stdout.startswith(r"def f(a):\n")


@pytest.mark.parametrize(
    ("command", "options", "text"),
    [
        ("sample", ("--policy", "psychic"), "policy must be one of "),
        ("sample", ("--policy", "threshold:level=1"), "policy 'threshold' has the parameters"),
        ("sample", ("--policy", "threshold:threshold=high"), "threshold:threshold must be float, got 'high'"),
        ("sample", ("--policy", "threshold:threshold=-1"), "threshold must be in [0, inf], got -1.0"),
        ("sample", ("--policy", "threshold:0.9"), "--policy must be NAME or NAME:FIELD=VALUE"),
        ("sample", ("--policy", "threshold:"), "--policy must be NAME or NAME:FIELD=VALUE"),
        ("sample", ("--policy", "threshold:threshold=1,threshold=1"), "has 'threshold' twice"),
        ("sample", ("--length", 4, "--top-p", 0.0), "top_p must be in (0, 1], got 0.0"),
        ("sample", ("--length", 40), "and the model takes 32"),
        ("sample", ("--length", 20, "--prompt", "x = 1 + 2 + 3 + 4 + 5 + 6 + 7"), "and the model takes 32"),
        ("sample", ("--steps", 0), "Invalid value for '--steps'"),
        ("sample", ("--length", 8, "--steps", 2, "--block-length", 2), "steps must be at least the 4 blocks"),
        ("sample", ("--prompt", ""), "the prompt must not be empty"),
        ("sample", ("--prompt", "x", "--chat"), "--chat needs a tokenizer with a chat template"),
        ("sample", ("--length", 4, "--cache", "magic"), "got 'magic'"),
        ("infill", ("--text", "a [MASK:2]", "--cfg", -1), "Invalid value for '--cfg'"),
        ("sample", ("--html", "/no/such/folder/run.html"), "--html must be a file in a folder that is there"),
        ("sample", ("--out", "x.jsonl"), "--out needs --in"),
        ("sample", ("--in", "/no/such.jsonl"), "No such file"),
        ("infill", ("--text", "nothing to fill"), "text must have a span [MASK:n] to fill"),
        ("infill", ("--text", "[MASK:many]"), "text must mark spans as [MASK:n]"),
        ("infill", ("--text", "[MASK:40]"), "and the model takes 32"),
        ("infill", (), "give one of --text and --in"),
    ],
)
def test_wrong_options_are_one_line(fails, adapted_model, command, options, text):
    fails(2, (text,), command, "--model", adapted_model, "--device", "cpu", *options)


@pytest.mark.parametrize("command", [("sample",), ("infill", "--text", "[MASK:3]")], ids=["sample", "infill"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("gpt2", "mask_token_id=None"), ("t5", "is not a causal language model"), ("nowhere", "no such directory")],
)
def test_models_that_cannot_be_sampled_from(fails, models, command, name, text):
    fails(2, (text,), *command, "--model", models / name, "--device", "cpu")


def test_guidance_and_caches_reach_the_model(sample, infill):
    """Guidance takes two forwards a step; with a block a token long, the prefix cache changes no text of one block."""
    plain, guided = (json.loads(sample("--prompt", "def", "--json", *o).stdout) for o in ((), ("--cfg", 2)))
    assert (guided["nfe"], guided["completion"] != plain["completion"]) == (12, True)
    cached = sample("--prompt", "def", "--json", "--cache", "prefix", "--block-length", 6)
    assert json.loads(cached.stdout)["nfe"] == 6
    assert infill("--text", "def [MASK:4]", "--cfg", 1, "--cache", "dual", "--block-length", 2).exit_code == 0


def test_a_text_ends_at_the_end_token(sample, adapted_model, tmp_path):
    """The greedy text's own third token is made the end token."""
    options = ("--prompt", "def", "--temperature", 0, "--json", "--block-length", 1)
    whole = json.loads(sample(*options, "--no-eos").stdout)
    assert whole["tokens"] == 6
    tokenizer = AutoTokenizer.from_pretrained(adapted_model)
    model = AutoModelForCausalLM.from_pretrained(adapted_model)
    ids = (
        generate(
            prepare(model),
            length=6,
            prompt_ids=tokenizer("def", return_tensors="pt")["input_ids"],
            temperature=0.0,
            block_length=1,
        )
        .sequences[0, -6:]
        .tolist()
    )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[2])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ended = json.loads(sample(*options, "--model", tmp_path).stdout)
    n_tokens = ids.index(ids[2]) + 1
    assert ended["tokens"] == n_tokens
    assert ended["completion"] == tokenizer.decode(ids[: n_tokens - 1], skip_special_tokens=True)
    assert json.loads(sample(*options, "--model", tmp_path, "--no-eos").stdout)["tokens"] == 6


def test_a_chat_template_is_put_around_the_prompt(sample, adapted_model, tmp_path):
    shutil.copytree(adapted_model, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant> "
    tokenizer.save_pretrained(tmp_path / "chat")
    result = sample("--model", tmp_path / "chat", "--prompt", "x", "--chat")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("<user> x\n<assistant> ")


def test_page_and_live_view(sample, infill, tmp_path):
    plain = sample("--prompt", "def", "-n", 2)
    shown = sample("--prompt", "def", "-n", 2, "--live", "--html", tmp_path / "run.html")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == plain.stdout
    assert "step 6: 0 masked" in shown.stderr
    assert (tmp_path / "run.html").read_text(encoding="utf-8").count('"written"') == 2 * 6  # rows, steps
    assert infill("--text", "def [MASK:3]", "--html", tmp_path / "fill.html").exit_code == 0
    assert "<title>infill: 3 steps</title>" in (tmp_path / "fill.html").read_text(encoding="utf-8")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_inputs_one_by_one(sample, prompts, tmp_path):
    """Order, ids, and texts that do not depend on the batch; a text from nothing has the prompt's seat empty."""
    for size in (1, 3, 8):
        result = sample("--in", prompts, "--out", tmp_path / f"{size}.jsonl", "--batch-size", size, "--n", 2)
        assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "1.jsonl")
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(4) for s in range(2)]
    assert [row.get("id") for row in rows] == ["a", "a", *[None] * 6]
    assert rows[0]["text"].startswith("def add(")
    assert rows[0]["text"].endswith(rows[0]["completion"])
    assert all(row["text"] == row["completion"] for row in rows[4:])
    assert len({row["completion"] for row in rows}) == 8
    assert rows == rows_of(tmp_path / "3.jsonl") == rows_of(tmp_path / "8.jsonl")
    to_stdout = sample("--in", prompts, "--n", 2)
    assert [json.loads(line) for line in to_stdout.stdout.splitlines()] == rows


def test_an_interrupted_batch_resumes(sample, prompts, tmp_path, monkeypatch):
    """Killed in the middle of a line, or by Ctrl-C: what is whole is kept, not made again; the end is the same."""
    command = ("--in", prompts, "--batch-size", 1, "--n", 2, "--out")
    whole = tmp_path / "whole.jsonl"
    assert sample(*command, whole).exit_code == 0
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    real_write, calls = sampling_run.Output.write, []

    def counted(self, records):
        calls.append(records[0]["index"])
        if len(calls) == 3 and interrupt:
            raise KeyboardInterrupt
        real_write(self, records)

    monkeypatch.setattr(sampling_run.Output, "write", counted)
    out, interrupt = tmp_path / "out.jsonl", True
    stopped = sample(*command, out)
    assert (stopped.exit_code, stopped.stderr.splitlines()[-1]) == (130, "diffullama: interrupted")
    assert out.read_text(encoding="utf-8") == "".join(lines[:4])
    interrupt = False
    for torn in ("", lines[4], lines[4] + lines[5][:9], lines[4][:20]):
        out.write_text("".join(lines[:4]) + torn, encoding="utf-8")
        calls.clear()
        resumed = sample(*command, out)
        assert resumed.exit_code == 0, resumed.output
        assert "2 of 4 are there" in resumed.stderr
        assert calls == [2, 3]
        assert out.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")
    calls.clear()
    assert sample(*command, out).exit_code == 0
    assert calls == []


def test_results_of_another_run_are_not_added_to(fails, sample, adapted_model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    assert sample("--in", prompts, "--out", out).exit_code == 0
    before = out.read_bytes()
    command = ("sample", "--model", adapted_model, "--device", "cpu", "--in", prompts, "--out", out)
    fails(2, ("line 1, is not of this run",), *command, "--length", 6, "--seed", 1)
    fails(2, ("line 1, is not of this run",), *command, "--length", 7)
    assert out.read_bytes() == before
    out.write_text("my notes\n")
    fails(2, ("line 1, is not of this run",), *command, "--length", 6)
    assert out.read_text() == "my notes\n"


def test_infilling_a_file(infill, tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "def [MASK:2](a):\\n    return [MASK:1]", "id": 7}\n{"text": "[MASK:3] end"}\n')
    result = infill("--in", source)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["index"], len(row["fills"]), row["nfe"]) for row in rows] == [(0, 2, 3), (1, 1, 3)]
    assert rows[0]["id"] == 7
    assert rows[0]["text"] == "def {}(a):\n    return {}".format(*rows[0]["fills"])


@pytest.mark.parametrize(
    ("command", "lines", "text"),
    [
        ("sample", '{"prompt": "a"}\n{"prompt": ""}', "line 2: the prompt must not be empty"),
        ("sample", '{"prompt": 3}', 'line 1: "prompt" must be a text, got 3'),
        ("sample", "[1]", "line 1: must be a JSON object"),
        ("sample", '{"prompt"', "line 1: is no JSON (Expecting ':' delimiter at character 10): '{\"prompt\"'"),
        ("sample", "\n \n", "has no line"),
        (
            "sample",
            '{"prompt": "a"}\n' + json.dumps({"prompt": "a b " * 20}),
            "input 2 has 41 tokens and gets 6 more, and the model takes 32",
        ),
        ("infill", '{"text": "no span"}', "line 1: text must have a span"),
        ("infill", '{"prompt": "[MASK:1]"}', 'line 1: "text" must be a text with spans'),
        ("infill", '{"text": "[MASK:1]"}\n{"text": "[MASK:40]"}', "inputs 1 to 2 of"),
    ],
)
def test_a_wrong_input_line_is_named_before_anything_is_written(fails, adapted_model, tmp_path, command, lines, text):
    source = tmp_path / "in.jsonl"
    source.write_text(lines)
    out = tmp_path / "out.jsonl"
    options = ("--length", 6) if command == "sample" else ()
    fails(2, (text,), command, "--model", adapted_model, "--device", "cpu", "--in", source, "--out", out, *options)
    assert not out.exists() or not out.read_text()


def test_a_file_that_is_not_text_and_an_output_that_cannot_be(fails, sample, adapted_model, prompts, tmp_path):
    command = ("sample", "--model", adapted_model, "--device", "cpu", "--length", 6, "--in")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    fails(2, ("is not UTF-8 text (byte 12)",), *command, tmp_path / "latin.jsonl")
    fails(2, ("No such file or directory",), *command, prompts, "--out", tmp_path / "no" / "out.jsonl")


@pytest.mark.parametrize("option", [("--prompt", "x"), ("--live",), ("--html", "x.html")])
def test_a_file_goes_with_no_option_of_one_input(fails, adapted_model, prompts, option):
    fails(2, ("--in",), "sample", "--model", adapted_model, "--in", prompts, *option)
