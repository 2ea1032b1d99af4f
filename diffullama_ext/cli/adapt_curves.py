# SPDX-License-Identifier: Apache-2.0
"""What an adaptation is worth on held-out examples: before, in the middle and after, under the same noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output_folder import write_file_at_once
from .console import Report, scores_table

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from ..evaluation import DiffusionScores, Estimate

HELDOUT_EXAMPLES = 128  # at most so many are scored on

Scores = tuple["Estimate", "DiffusionScores"]


def heldout_batch(held: Dataset[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """What is scored on: evenly spaced examples, so that each source has its share, padded to one length.

    ``blocks`` [N, L] and, where the examples have them, ``maskable``, ``attention_mask`` and ``document_ids``.
    """
    from ..training import DiffusionCollator

    size = len(held)  # type: ignore[arg-type]
    n = min(size, HELDOUT_EXAMPLES)
    examples = [{**held[place * size // n], "sample_index": place} for place in range(n)]
    batch = DiffusionCollator(pad_id)(examples)
    del batch["sample_index"]
    return {"blocks": batch.pop("input_ids"), **batch}


class Curves:
    """Held-out figures by step, kept in a file for a run that goes on.

    Args:
        path: of the file.
        held: of :func:`heldout_batch`.
        block_length: of block diffusion; a growing one's last, so that all steps compare.
        batch_size: examples a forward.
    """

    def __init__(
        self, path: Path, held: Mapping[str, Tensor], block_length: int | None, batch_size: int, report: Report
    ) -> None:
        self.path, self.block_length = path, block_length
        self.held: dict[str, Any] = dict(held)
        self.batch_size, self.report = batch_size, report
        self.by_step: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.last: dict[str, Scores] = {}

    def score(self, model: Any, step: int) -> None:
        """At ``step``; random state stays as it was, so that training does not depend on it."""
        from ..evaluation import EvaluationConfig, autoregressive_loss, diffusion_scores
        from ..integrations import DiffusionConfig

        config = DiffusionConfig.of(model)
        stage = f"evaluate at step {step}"
        ar = autoregressive_loss(model, **self.held, batch_size=self.batch_size)
        scores = diffusion_scores(
            model,
            **self.held,
            config=EvaluationConfig(batch_size=self.batch_size),
            mask_id=config.mask_id,
            shift=config.shift,
            block_length=self.block_length,
            progress=lambda done, total: self.report(stage, done, total, ""),
        )
        self.last[str(step)] = (ar, scores)
        self.by_step[str(step)] = {"ar_loss": ar.to_dict(), **scores.to_dict()}
        write_file_at_once(self.path, json.dumps(self.by_step, indent=1, allow_nan=False) + "\n")

    def n_tokens(self) -> int:
        """Held-out tokens that may be noised."""
        import torch

        able = torch.ones_like(self.held["blocks"], dtype=torch.bool)
        for name in {"maskable", "attention_mask"} & set(self.held):
            able = able & self.held[name]
        return int(able.sum())

    def show(self, out: Path) -> None:
        """The figures, where there are any, as a table; where the model is."""
        from rich.console import Console

        console = Console(soft_wrap=True, highlight=False)
        rows = self.last
        if rows:
            names = {step: "as it was" if step == "0" else f"step {step}" for step in rows}
            names[list(rows)[-1]] = "adapted"
            held = f"{self.n_tokens()} tokens in {len(self.held['blocks'])} examples"
            title = f"Held out: {held}, nats ± standard error, one noise for all"
            console.print(scores_table(title, {names[step]: scores for step, scores in rows.items()}))
        if "0" in rows:
            difference = list(rows.values())[-1][1].diffusion_loss - rows["0"][1].diffusion_loss
            console.print(f"ELBO/token, adapted minus as it was: {difference}", markup=False)
        console.print(f"The adapted model is in {out}", markup=False)
