# SPDX-License-Identifier: Apache-2.0
"""benchmarks/anneal_gradients.py on a model of seconds: its ways differ in the attention alone."""

import pytest
import torch

pytest.importorskip("benchmarks", reason="no benchmarks beside the tests")

from benchmarks.anneal_gradients import CAUSAL, FirstSteps, autoregressive, first_steps, prepared, table
from diffullama_ext.demo.config import DemoConfig
from diffullama_ext.demo.training import Samples

CONFIG = DemoConfig(
    vocab_size=300, length=16, layers=1, width=16, heads=2, batch_size=8, ar_steps=5, corpus_chars=300_000
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    tokenizer, train = prepared(CONFIG)
    cache = tmp_path_factory.mktemp("cache")
    model = autoregressive(CONFIG, tokenizer, train, cache)
    again = autoregressive(CONFIG, tokenizer, train, cache)  # from the cache
    for ours, kept in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, kept)
    return model, tokenizer, train


def test_every_way_starts_from_the_same_model_and_noise(start):
    before = [p.clone() for p in start[0].parameters()]
    causal, same, full, ar = (first_steps(CONFIG, *start, steps, 3) for steps in (CAUSAL, CAUSAL, 0, None))
    assert causal == same
    assert full.loss[0] != causal.loss[0]
    assert full.loss[0] == pytest.approx(causal.loss[0], rel=0.05)
    model, _, train = start
    x0, _ = Samples(train, CONFIG.ar_steps * CONFIG.batch_size, CONFIG.seed).batch(0, CONFIG.batch_size)
    assert ar.loss[0] == pytest.approx(model(x0, labels=x0).loss.item(), rel=1e-5)  # transformers' own next-token loss
    for ours, kept in zip(start[0].parameters(), before, strict=True):
        assert torch.equal(ours, kept)


def test_an_annealing_that_is_over_at_once_is_none(start):
    assert first_steps(CONFIG, *start, 1, 3) == first_steps(CONFIG, *start, 0, 3)


def test_table_pairs_the_seeds():
    runs = {"none": [FirstSteps([2.0], [3.0]), FirstSteps([4.0], [5.0])], "causal": [FirstSteps([1.0], [2.0])] * 2}
    assert table(runs).splitlines()[2].split(" | ")[-1] == "2.00 +- 0.50 |"  # of 3 / 2 and 5 / 2
