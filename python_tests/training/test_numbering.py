# SPDX-License-Identifier: Apache-2.0
"""The numbers of samples, and the batches made of them."""

from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from test_trainer import examples, stream
from torch.utils.data import BatchSampler, DataLoader

from diffullama_ext.objective import draw_t
from diffullama_ext.training import DiffusionCollator, NumberedDataset, NumberedSampler

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
