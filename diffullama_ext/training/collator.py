# SPDX-License-Identifier: Apache-2.0
"""Examples of different lengths as one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiffusionCollator:
    """Pads on the right.

    An example holds ``input_ids`` (ids of clean tokens), ``sample_index`` (its number), and optionally
    ``attention_mask`` (0 for padding), ``maskable`` (0 for a prompt: neither masked nor scored) and ``document_ids``
    (attention stays inside documents), each of its length.

    Returns a batch of ``input_ids`` [B, L] int64 and ``sample_index`` [B] int64; ``maskable`` [B, L] bool and
    ``document_ids`` [B, L] int64 where an example has it; ``attention_mask`` [B, L] bool only where something is
    padding, so that attention without padding needs no look at a mask on the device.
    """

    pad_id: int = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """See the class."""
        for name in ("input_ids", "sample_index"):
            if name not in examples[0]:
                raise ValueError(
                    f"an example must hold {name!r}, got {sorted(examples[0])}"
                    + ("; an iterable dataset must number its samples itself" if name == "sample_index" else "")
                )
        batch = {
            "input_ids": self._padded(examples, "input_ids", self.pad_id).long(),
            "sample_index": torch.tensor([int(example["sample_index"]) for example in examples]),
        }
        attention_mask = self._padded(examples, "attention_mask", 0).bool()
        if not attention_mask.all():
            batch["attention_mask"] = attention_mask
        if any("maskable" in example for example in examples):
            batch["maskable"] = self._padded(examples, "maskable", 0).bool()
        if any("document_ids" in example for example in examples):
            batch["document_ids"] = self._padded(examples, "document_ids", -1).long()
        return batch

    def _padded(self, examples: Sequence[Mapping[str, Any]], name: str, value: int) -> Tensor:
        """[B, L] of what the examples hold under ``name``; 1 for each token of an example that lacks it."""
        rows = []
        for example in examples:
            length = len(example["input_ids"])
            row = torch.as_tensor(example[name]) if name in example else torch.ones(length, dtype=torch.int64)
            if row.shape != (length,):
                raise ValueError(f"{name} of an example must have its {length} tokens' length, got {list(row.shape)}")
            rows.append(row)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
