# SPDX-License-Identifier: Apache-2.0
"""Examples of every kind as DiffusionTrainer takes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_cases import adapted
from tiny_models import MASK_ID, WORDS, word_tokenizer
from transformers import TrainingArguments

from diffullama_ext.data import DataSource, load_blocks, load_sft, stream_blocks
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig
from diffullama_ext.training import DiffusionCollator, DiffusionTrainer


@pytest.fixture
def tokenizer():
    return word_tokenizer(eos_token="w58", bos_token="w57")


def losses(folder: Path, dataset: Any, **options: Any) -> list[float]:
    arguments = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = DiffusionTrainer(adapted(), arguments, train_dataset=dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_stored_and_streamed_blocks_train_alike(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{2 + i * i % 50}" for i in range(400)))
    sources = [DataSource(tmp_path / "a.txt")]
    stored = load_blocks(sources, tokenizer, 12, cache_dir=tmp_path / "cache")
    got = losses(tmp_path, stored, train_sampling_strategy="sequential")
    assert len(got) == 3
    assert all(0 < loss < 50 for loss in got)
    assert got == losses(tmp_path, stream_blocks(sources, tokenizer, 12))


@pytest.mark.parametrize("padding", ["eos", "exclude"])
def test_prompts_are_seen_and_never_scored(tmp_path: Path, tokenizer: Any, padding: str) -> None:
    rows = [{"prompt": "w9 " * n, "response": "w6 " * (6 - n)} for n in range(1, 6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_sft([DataSource(tmp_path / "a.jsonl")], tokenizer, 12, padding=padding)
    assert len(losses(tmp_path, examples)) == 3
    batch = DiffusionCollator()([{**examples[i], "sample_index": i} for i in range(len(examples))])
    x0, maskable = batch.pop("input_ids"), batch["maskable"]
    noised = DiffusionObjective(ObjectiveConfig(MASK_ID)).noise(x0, seed=0, t=torch.ones(5), **batch)
    assert not (noised.xt[~maskable] == MASK_ID).any()
    assert not noised.scored[x0 == WORDS.index("w9")].any()
    n_responses = [6 - n + 1 for n in range(1, 6)]
    expected = n_responses if padding == "exclude" else [12 - 1 - n for n in range(1, 6)]
    assert noised.scored.sum(dim=1).tolist() == expected
