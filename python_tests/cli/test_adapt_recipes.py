# SPDX-License-Identifier: Apache-2.0
"""What `diffullama adapt` hands on to the objective and to Trainer: variants, a teacher, precision, loggers."""

import importlib.util
import json

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Counter:\n    n = 0\n" * 40
QUICK = ("--steps", 3, "--length", 16, "--batch-size", 4, "--learning-rate", 0.01, "--device", "cpu")
QUICK += ("--eval-steps", 2)  # one curve in the middle
VARIANTS = {
    "stratified": ("strata=4",),
    "antithetic": ("antithetic=true",),
    "exact count": ("exact_count=true",),
    "cart": ("loss_weight=cart", "cart_p=0.2"),
    "nested": ("views=nested",),
    "complementary": ("views=complementary", "exact_count=true", "t_min=0.2", "t_max=0.8"),
    "mix": ("noise=mix", "vocab_size=280", "loss_weight=uniform"),
    "blocks": ("block_length=8", "block_length_start=2", "block_length_steps=2", "strata=2"),
    "equality": ("loss_mask=equality", "normalizer=masked"),
    "llada": ("recipe=llada",),
    "llada sft": ("recipe=llada_sft", "normalizer=batch"),
    "dream": ("recipe=dream",),
    "diffullama": ("recipe=diffullama", "t_min=1e-2"),
}


def adapting_in(folder, run, models):
    def call(name, *arguments, model=models / "gpt2"):
        out, data = folder / name, folder / "corpus.txt"
        data.write_text(TEXT)
        result = run("adapt", "--model", model, "--data", data, "--out", out, *QUICK, *arguments)
        assert result.exit_code == 0, result.output
        last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry], AutoModelForCausalLM.from_pretrained(out)

    return call


@pytest.fixture
def adapting(run, models, tmp_path):
    """Adapt into the folder ``name``; the losses of the steps and the model."""
    return adapting_in(tmp_path, run, models)


@pytest.fixture(scope="module")
def plain(run, models, tmp_path_factory):
    """The losses of the default objective."""
    return adapting_in(tmp_path_factory.mktemp("plain"), run, models)("out")[0]


def flags(*settings):
    return [part for setting in settings for part in ("--objective", setting)]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_each_variant_trains_and_is_another_loss(adapting, plain, settings, tmp_path):
    losses, model = adapting("out", *flags(*settings))
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)
    assert losses != plain
    assert model.config.diffusion["shift"] == (not settings[0].startswith("recipe=llada"))
    bins = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert list(bins) == ["0", "2", "3"]
    assert all(len(scores["masked_loss_by_bin"]) == 8 for scores in bins.values())


def test_blocks_are_scored_under_their_own_mask(adapting, tmp_path):
    adapting("whole", "--learning-rate", 1e-9)
    adapting("blocks", "--learning-rate", 1e-9, *flags("block_length=4"))
    whole, blocks = (json.loads((tmp_path / n / "curves.json").read_text())["0"] for n in ("whole", "blocks"))
    assert whole["ar_loss"] == blocks["ar_loss"]
    assert whole["diffusion_loss"]["mean"] != blocks["diffusion_loss"]["mean"]


# --- a teacher --------------------------------------------------------------------------------------------------------


def test_a_teacher_adds_its_divergence(adapting, adapted_model):
    distil = flags("distill_weight=0.5", "distill_top_k=4")
    options = ("--anneal-steps", 0)
    taught, _ = adapting("taught", "--teacher", adapted_model, *distil, *options, model=adapted_model)
    plain, _ = adapting("plain", *options, model=adapted_model)
    assert taught[0] > plain[0] + 1e-3


def test_teachers_that_do_not_fit(fails, models, adapted_model, text_file, tmp_path):
    command = ("adapt", "--model", adapted_model, "--data", text_file, "--out", tmp_path / "out", *QUICK)
    distil = flags("distill_weight=0.5")
    fails(2, ("teacher and a distill_weight above 0 need each other, got None and 0.5",), *command, *distil)
    fails(2, ("need each other, got", "and 0"), *command, "--teacher", adapted_model)
    fails(2, ("no such directory", "nowhere"), *command, *distil, "--teacher", models / "nowhere")
    fails(2, ("is not adapted to diffusion",), *command, *distil, "--teacher", models / "gpt2")
    fails(2, ("teacher must have the model's mask id 7, got ",), *command, *distil, "--teacher", adapted_model,
          "--mask-token", 7)  # fmt: skip
    other = AutoTokenizer.from_pretrained(adapted_model)
    other.add_tokens(["another"])
    model = AutoModelForCausalLM.from_pretrained(adapted_model)
    model.resize_token_embeddings(len(other), mean_resizing=False)
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    fails(2, ("teacher must have the model's vocabulary", "differs in 1 entries"), *command, *distil, "--teacher",
          tmp_path / "other")  # fmt: skip
    assert not (tmp_path / "out").exists()


# --- precision, memory, compilation -----------------------------------------------------------------------------------


def test_bf16_and_recomputed_activations(adapting, plain):
    low, model = adapting("low", "--bf16")
    assert low == pytest.approx(plain, rel=0.05)
    assert low != plain
    assert model.dtype == torch.float32
    recomputed, _ = adapting("recomputed", "--activation-checkpointing")
    assert recomputed == pytest.approx(plain, rel=1e-6)


def test_fp16_needs_a_gpu(fails, models, text_file, tmp_path):
    arguments = ("--model", models / "gpt2", "--data", text_file, "--out", tmp_path / "out")
    fails(2, ("fp16 must be False on the CPU, got True; bf16 works there",), "adapt", *arguments, *QUICK, "--fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`", "ignore:The .grad attribute of")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
def test_a_compiled_run_compiles_once_and_goes_on(adapting, models, tmp_path, monkeypatch):
    """Without a graph break; annealing off, since its end makes another kind of mask, and so another graph."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # no code of an earlier version's ops
    still = AutoModelForCausalLM.from_pretrained(models / "gpt2", resid_pdrop=0.0, embd_pdrop=0.0)
    still.save_pretrained(tmp_path / "still")  # inductor's dropout draws other numbers
    AutoTokenizer.from_pretrained(models / "gpt2").save_pretrained(tmp_path / "still")
    options = ("--steps", 6, "--anneal-steps", 0, "--save-steps", 3, "--save-total-limit", 9)
    plain, model = adapting("plain", *options, model=tmp_path / "still")
    torch._dynamo.reset()
    counters.clear()
    compiled, other = adapting("compiled", "--compile", *options, model=tmp_path / "still")
    assert compiled == pytest.approx(plain, rel=1e-4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert counters["stats"]["unique_graphs"] <= 2  # the model with its loss, and what its output becomes

    out = tmp_path / "compiled"
    for name in ("metrics.json", "checkpoint-6/diffullama.json"):
        (out / name).unlink()
    (out / "checkpoint-6").rename(tmp_path / "later")
    resumed, again = adapting("compiled", "--compile", *options, model=tmp_path / "still")
    assert resumed == compiled
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), other.parameters(), strict=True))


# --- loggers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_loggers_get_the_losses(adapting, tmp_path, monkeypatch, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(variable, value)
    losses, _ = adapting("out", "--report-to", name, "--logging-steps", 1)
    assert len(losses) == 3
    if name == "wandb":
        # As at the end of the command's own process. finish() does not wait for the file.
        importlib.import_module("wandb").teardown()
        files = list(tmp_path.glob("**/run-*.wandb"))
        assert any(b"attn_mask_ratio" in file.read_bytes() for file in files)
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.glob("**/events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in log.Scalars("train/attn_mask_ratio")] == [1, 2, 3]


def test_a_logger_that_is_not_there(fails, models, text_file, tmp_path):
    arguments = ("--model", models / "gpt2", "--data", text_file, "--out", tmp_path / "out")
    fails(
        2,
        ("report_to must be a logger of transformers that is installed", "got 'paper'"),
        "adapt",
        *arguments,
        *QUICK,
        "--report-to",
        "paper",
    )
    assert not (tmp_path / "out").exists()
