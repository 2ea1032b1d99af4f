# SPDX-License-Identifier: Apache-2.0
"""The demo's parts: sizes, the stream of samples, the loop, the lines it masks, and what it replaces."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from diffullama_ext.data import Document, train_tokenizer
from diffullama_ext.demo import DemoConfig, check_replaceable
from diffullama_ext.demo.samples import _snippets, _window
from diffullama_ext.demo.training import Samples, fit, learning_rate_at
from diffullama_ext.output_folder import is_free

# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "cuda", "quick"])
def test_presets_are_valid_and_take_the_seed(name):
    config = DemoConfig.preset(name, seed=3)
    assert config.seed == 3
    assert config.sample_steps <= config.length
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be in .*, got 0"),
        ({"width": 100, "heads": 3}, "width must be a multiple of heads, got 100 and 3"),
        ({"anneal_steps": 9, "diffusion_steps": 8}, "anneal_steps must be at most diffusion_steps, got 9 and 8"),
    ],
    ids=["layers", "heads", "annealing"],
)
def test_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**options)


def test_no_such_preset():
    with pytest.raises(ValueError, match="preset must be one of 'cpu', 'cuda', 'quick', got 'tpu'"):
        DemoConfig.preset("tpu")


# --- the stream of samples -------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_and_numbers_run_on():
    blocks = torch.arange(10, dtype=torch.int32)[:, None]
    samples = Samples(blocks, first_sample=0, seed=4)
    batches = [samples.batch(step, 4) for step in range(5)]  # two epochs
    stream = torch.cat([x0 for x0, _ in batches]).flatten()
    assert torch.cat([index for _, index in batches]).tolist() == list(range(20))
    assert sorted(stream[:10].tolist()) == sorted(stream[10:].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:].tolist()


def test_a_later_start_continues_the_same_stream():
    blocks = torch.arange(7, dtype=torch.int32)[:, None]
    whole = torch.cat([Samples(blocks, 0, 1).batch(step, 3)[0] for step in range(6)])
    later = torch.cat([Samples(blocks, 6, 1).batch(step, 3)[0] for step in range(4)])
    assert torch.equal(whole[6:], later)


# --- the loop --------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [learning_rate_at(step, 100, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_fit_minimises_and_reports():
    model = nn.Linear(3, 1)
    target = torch.randn(8, 3)
    seen = []
    losses = fit(
        model,
        Samples(torch.arange(8, dtype=torch.int32)[:, None], 0, 0),
        lambda x0, index, step: (model(target[x0[:, 0]]) - target[x0[:, 0]].sum(1, keepdim=True)).square().mean(),
        steps=200,
        batch_size=8,
        learning_rate=0.1,
        progress=lambda done, total, loss: seen.append((done, total, loss)),
    )
    assert losses[-1] < 0.05 * losses[0]
    assert [(done, total) for done, total, _ in seen] == [(step + 1, 200) for step in range(200)]
    assert [loss for *_, loss in seen] == losses


def test_fit_shows_norms_before_clipping_and_stops_early():
    samples, start = Samples(torch.zeros(2, 1, dtype=torch.int32), 0, 0), nn.Linear(1, 1, bias=False)

    def run(stop):
        model, seen = copy.deepcopy(start), []
        losses = fit(
            model,
            samples,
            lambda x0, index, step: 7 * (step + 1) * model.weight.sum(),
            steps=40,
            batch_size=1,
            learning_rate=0.1,
            observe=lambda *values: seen.append(values),
            stop=stop,
        )
        assert [(step, loss) for step, loss, _ in seen] == list(enumerate(losses))
        return losses, [norm for *_, norm in seen]

    losses, norms = run(3)
    assert norms == [7.0, 14.0, 21.0]
    assert losses == run(None)[0][:3]  # the learning rate goes by all of the steps


def test_fit_stops_at_a_loss_that_is_not_finite():
    model = nn.Linear(1, 1)
    samples = Samples(torch.zeros(2, 1, dtype=torch.int32), 0, 0)
    with pytest.raises(RuntimeError, match="the loss became nan at step 0 of 3"):
        fit(
            model,
            samples,
            lambda x0, index, step: model(x0.float()).sum() * float("nan"),
            steps=3,
            batch_size=1,
            learning_rate=1.0,
        )


# --- the lines it masks ----------------------------------------------------------------------------------------------


def test_masked_lines_fit_the_model_and_can_be_put_back():
    source = "".join(f"def f{i}(a, b):\n    c = a + b * {i}\n    return c\n\n" for i in range(20))
    documents = [Document("topic/x", source), *(Document(f"lib/m{i}.py", source) for i in range(5))]
    tokenizer = train_tokenizer([source], 300)
    config = dataclasses.replace(DemoConfig.preset("quick"), length=48)
    found = list(_snippets(tokenizer, documents, config))
    assert sorted(name for name, *_ in found) == [f"lib/m{i}.py" for i in range(5)]
    for _, prompt, truth in found:
        n_tokens = len(tokenizer.encode(truth, add_special_tokens=False))
        whole = prompt.replace(f"[MASK:{n_tokens}]", truth)
        assert whole in source
        assert len(tokenizer.encode(whole, add_special_tokens=False)) <= 46
        assert not prompt.startswith("[MASK")
        assert not prompt.rstrip("\n").endswith("]")


@pytest.mark.parametrize(
    ("sizes", "place", "room", "expected"),
    [
        ([5, 5, 5, 5, 5], 2, 25, (0, 4)),
        ([5, 5, 5, 5, 5], 2, 15, (1, 3)),
        ([5, 5, 5, 5, 5], 0, 15, (0, 2)),
        ([9, 5, 5, 1, 1], 2, 8, (2, 4)),
        ([5], 0, 4, (0, 0)),
    ],
)
def test_window_grows_to_both_sides_within_its_room(sizes, place, room, expected):
    assert _window(sizes, place, room) == expected


# --- the folder of a run ---------------------------------------------------------------------------------------------


def test_only_new_empty_and_former_run_folders_are_replaceable(tmp_path):
    check_replaceable(tmp_path / "new")
    check_replaceable(tmp_path)
    assert is_free(tmp_path)
    (tmp_path / "metrics.json").write_text('{"kind": "diffullama demo"}')
    check_replaceable(tmp_path)
    assert not is_free(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("thesis.txt", "x"), ("metrics.json", '{"kind": "other"}'), ("metrics.json", "[]"), ("metrics.json", "{broken")],
)
def test_other_folders_are_not(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match="exists and is not a former demo run"):
        check_replaceable(tmp_path)


def test_a_file_is_not(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="exists and is not a former demo run"):
        check_replaceable(tmp_path / "out")
