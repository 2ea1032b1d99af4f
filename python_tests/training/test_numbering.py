# SPDX-License-Identifier: Apache-2.0
"""The numbers of samples, and the batches made of them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from test_trainer import Stream as Rows
from test_trainer import adapted, arguments, examples, stream
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from diffullama_ext.objective import draw_t
from diffullama_ext.training import DiffusionCollator, DiffusionTrainer, NumberedDataset, NumberedSampler
from diffullama_ext.training.checkpoints import checkpoints

# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_sampler_numbers_the_stream() -> None:
    sampler, got = NumberedSampler(18, shuffle=True, seed=42), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(sampler) == 18
        got += list(sampler)
    assert got == stream(54)
    assert sorted(index for _, index in got[:18]) == list(range(18))
    assert list(NumberedSampler(3, shuffle=False)) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(("processes", "size"), [(2, 2), (4, 1), (1, 4)])
def test_processes_share_the_steps_samples(processes: int, size: int) -> None:
    """Samples of an optimiser step, by number, are those of one process with the whole batch."""
    batches = [
        list(BatchSamplerShard(BatchSampler(NumberedSampler(16, shuffle=True, seed=1), size, False), processes, rank))
        for rank in range(processes)
    ]
    for step, parts in enumerate(zip(*batches, strict=True)):
        assert [number for part in parts for number, _ in part] == list(range(4 * step, 4 * step + 4))


def test_numbered_samples_reach_the_batch_through_workers() -> None:
    data = NumberedDataset(examples(6))
    loader = DataLoader(
        data, 3, sampler=NumberedSampler(6, shuffle=True), collate_fn=DiffusionCollator(), num_workers=1
    )
    assert [batch["sample_index"].tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]


def test_strata_by_number_are_strata_of_a_batch(tmp_path: Path) -> None:
    t = draw_t(torch.arange(8, 16), 42, strata=4)
    assert (t[:4].sort().values.diff() > 0).all()
    assert sorted(((1 - t[:4]) * 4).int().tolist()) == [0, 1, 2, 3]


class Stream(IterableDataset):
    """18 samples an epoch; each worker gives its share."""

    def __init__(self) -> None:
        self.rows, self.epoch = examples(), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        share, n_shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place in range(share, 18, n_shares):
            yield self.rows[place] | {"sample_index": self.epoch * 18 + place}


def seen(path: Path, resume: bool = False, **changed: Any) -> list[tuple[int, list[int]]]:
    """(step, numbers of the samples) of each micro-batch of a run over the stream."""
    batches: list[tuple[int, list[int]]] = []

    class Seeing(DiffusionTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **options: Any) -> Any:
            batches.append((self.state.global_step, inputs["sample_index"].tolist()))
            return super().compute_loss(model, inputs, *rest, **options)

    Seeing(adapted(), arguments(path, **changed), train_dataset=Stream()).train(resume_from_checkpoint=resume)
    return batches


def test_a_step_may_span_two_passes_of_a_stream(tmp_path: Path) -> None:
    """Five batches a pass, two a step: none is left over for a later step."""
    got = seen(tmp_path, gradient_accumulation_steps=2, max_steps=6)
    assert got == [(place // 2, list(range(4 * place, 4 * place + 4))) for place in range(12)]


@pytest.mark.parametrize("save_steps", [3, 5, 8])
def test_a_stream_goes_on_where_it_was(tmp_path: Path, save_steps: int) -> None:
    changed = {"max_steps": 10, "save_strategy": "steps", "save_steps": save_steps}
    whole = seen(tmp_path, **changed)
    for path in checkpoints(tmp_path)[1:]:
        shutil.rmtree(path)
    assert seen(tmp_path, resume=True, **changed) == whole[save_steps:]


def test_workers_that_stay_are_told_the_epoch(tmp_path: Path) -> None:
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    numbers = [number for _, batch in seen(tmp_path, max_steps=8, **workers) for number in batch]
    assert sorted(numbers) == list(range(32))


@pytest.mark.parametrize(
    ("data", "changed", "message"),
    [
        (examples(3), {"dataloader_drop_last": True}, "gave no batch: .* drop_last leaves out less than 4 samples"),
        (Rows([]), {}, "an iterable train_dataset must give samples, got none in pass 0"),
    ],
    ids=["less than a batch", "an empty stream"],
)
def test_data_without_a_batch(tmp_path: Path, data: Any, changed: dict, message: str) -> None:
    trainer = DiffusionTrainer(adapted(), arguments(tmp_path, **changed), train_dataset=data)
    with pytest.raises(ValueError, match=message):
        trainer.train()


# --- the collator -----------------------------------------------------------------------------------------------------


def test_the_collator_pads() -> None:
    batch = DiffusionCollator(pad_id=9)(
        [
            {"input_ids": [1, 2, 3], "sample_index": 5, "maskable": [0, 1, 1]},
            {"input_ids": torch.tensor([4]), "sample_index": 6, "attention_mask": [1]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["maskable"].tolist() == [[False, True, True], [True, False, False]]
    assert batch["sample_index"].tolist() == [5, 6]


def test_the_collator_gives_no_mask_without_padding() -> None:
    rows = [{"input_ids": [1, 2], "attention_mask": [1, 1], "sample_index": i} for i in range(2)]
    assert set(DiffusionCollator()(rows)) == {"input_ids", "sample_index"}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "x"}, r"an example must hold 'input_ids', got \['text'\]"),
        ({"input_ids": [1]}, r"an example must hold 'sample_index', got \['input_ids'\]"),
        ({"input_ids": [1, 2], "sample_index": 0, "maskable": [1]}, r"maskable of an example must have its 2 tokens"),
    ],
    ids=["no ids", "no number", "other length"],
)
def test_the_collator_refuses(example: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionCollator()([example])
