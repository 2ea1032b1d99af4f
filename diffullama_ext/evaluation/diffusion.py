# SPDX-License-Identifier: Apache-2.0
"""What a masked diffusion model is worth on held-out blocks, under noise that is the same for every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention_mask import AttentionMask
from ..checks import check_int, check_range, check_tensor
from ..objective import DiffusionObjective, ObjectiveConfig, draw_t
from ..objective.model_forward import check_attention
from ..objective.noising import targets
from ..objective.streams import Attending, Streams, streams_of
from .estimate import Estimate, concatenated

LOGITS_ALIVE = 1 << 25  # entries of the largest logits chunk: 128 MB in float32

Progress = Callable[[int, int], None]  # (batches done, batches in all)


@dataclass(frozen=True)
class EvaluationConfig:
    """The draws are a function of (seed, block number) alone: any two models see the same.

    Attributes:
        draws: noise levels a block for the diffusion loss, one in each of ``draws`` equal strata of (t_min, 1].
        times: masking probabilities at which the plain loss and the accuracy are taken, one draw a block each.
        seed: of levels and masks.
        t_min: least noise level.
        batch_size: blocks a forward; it changes no figure beyond rounding.
    """

    draws: int = 8
    times: tuple[float, ...] = (0.15, 0.5, 0.85)
    seed: int = 0
    t_min: float = 1e-3
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_int("draws", self.draws, 1, 2**31 - 1)
        check_int("batch_size", self.batch_size, 1, 2**31 - 1)
        check_range("t_min", self.t_min, 0.0, 1.0, low_open=True)
        for t in self.times:
            check_range("times", t, 0.0, 1.0, low_open=True)


@dataclass(frozen=True)
class DiffusionScores:
    """Held-out figures; the losses in nats.

    Attributes:
        diffusion_loss: E_t[(1/t) * sum of nll over the masked] per token that could be scored: the ELBO, an upper bound
            of the negative log-likelihood (exact but for the t below t_min).
        masked_loss: by t, nll per masked token, unweighted.
        masked_accuracy: by t, share of masked tokens whose largest logit is the right one.
        masked_loss_by_bin: by (low, high) bin of t, nll per masked token at the levels of diffusion_loss.
    """

    diffusion_loss: Estimate
    masked_loss: dict[float, Estimate]
    masked_accuracy: dict[float, Estimate]
    masked_loss_by_bin: dict[tuple[float, float], Estimate] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "diffusion_loss": self.diffusion_loss.to_dict(),
            "masked_loss": {str(t): estimate.to_dict() for t, estimate in self.masked_loss.items()},
            "masked_accuracy": {str(t): estimate.to_dict() for t, estimate in self.masked_accuracy.items()},
            "masked_loss_by_bin": [
                {"t": list(ends), **estimate.to_dict()} for ends, estimate in sorted(self.masked_loss_by_bin.items())
            ],
        }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Heldout(NamedTuple):
    """A batch of held-out sequences: tokens [N, L] int32 or int64, and what is known of them, each [N, L] or None."""

    blocks: Tensor
    maskable: Tensor | None = None  # bool, False: a prompt
    attention_mask: Tensor | None = None  # bool or int64, 0: padding
    document_ids: Tensor | None = None  # int64

    def checked(self) -> Heldout:
        """At least one block of at least two tokens, and nothing of another shape."""
        check_tensor("blocks", self.blocks, (torch.int32, torch.int64), ("N", "L"))
        if self.blocks.shape[0] < 1 or self.blocks.shape[1] < 2:
            raise ValueError(f"blocks must be at least [1, 2], got {list(self.blocks.shape)}")
        targets(self.blocks.long(), *self[1:], shift=False)
        return self

    def split(self, size: int, device: torch.device) -> list[Heldout]:
        """Batches on the device, their tokens int64."""
        n_batches = len(self.blocks.split(size))
        columns = [[None] * n_batches if x is None else [part.to(device) for part in x.split(size)] for x in self]
        return [Heldout(blocks.long(), *rest) for blocks, *rest in zip(*columns, strict=True)]

    def attending(self, ratio: float) -> Attending:
        """Bidirectional attention (1) or causal (0), inside documents."""
        return Attending(self.attention_mask, self.document_ids, ratio, 0, 0)


def masked_scores(model: Any, x0: Tensor, scored: Tensor, streams: Streams, *, shift: bool) -> Tensor:
    """By sequence: the negative log-likelihood of its scored tokens, and how many of them have the largest logit.

    Args:
        model: a causal language model of transformers, adapted or not.
        x0: [B, L] int64 clean tokens.
        scored: [B, L] bool; with the shift no entry of column 0.
        streams: what the model reads.
        shift: logits row i scores token i+1.

    Returns:
        float64 [2, B].
    """
    hidden = model.base_model(**streams.inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    rows = streams.predicting(scored, hidden, shift)  # [n, H]
    target = x0[scored]
    by_token = torch.zeros((2, *scored.shape), dtype=torch.float64, device=x0.device)
    scores = []
    chunk = max(1, LOGITS_ALIVE // head.weight.shape[0])
    for start in range(0, len(rows), chunk):
        logits = head(rows[start : start + chunk]).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        ids = target[start : start + chunk]
        nll = nn.functional.cross_entropy(logits, ids, reduction="none")
        scores.append(torch.stack([nll, (logits.argmax(dim=1) == ids).float()]))
    if scores:
        by_token[:, scored] = torch.cat(scores, dim=1).double()
    return by_token.sum(dim=2)


@dataclass(frozen=True)
class _Scorer:
    """One model under one kind of noise."""

    model: Any
    objective: DiffusionObjective
    seed: int
    block_length: int | None
    diffusion_mask: AttentionMask | None

    def __call__(self, batch: Heldout, sample_index: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise at t [B]; by sequence the sums of nll and hits, the scored tokens, and those that could be, [B]."""
        x0, maskable, attention_mask, document_ids = batch
        noised = self.objective.noise(
            x0,
            maskable=maskable,
            attention_mask=attention_mask,
            document_ids=document_ids,
            seed=self.seed,
            sample_index=sample_index,
            t=t,
        )
        shift = self.objective.config.shift
        streams = streams_of(noised.xt, x0, batch.attending(1.0), self.block_length, shift)
        if self.diffusion_mask is not None:
            streams.inputs["diffusion_mask"] = self.diffusion_mask
        nll, hits = masked_scores(self.model, x0, noised.scored, streams, shift=shift)
        return nll, hits, noised.scored.sum(dim=1), noised.scorable.sum(dim=1)


def diffusion_scores(
    model: Any,
    blocks: Tensor,
    config: EvaluationConfig | None = None,
    *,
    mask_id: int,
    shift: bool,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    block_length: int | None = None,
    diffusion_mask: AttentionMask | None = None,
    progress: Progress | None = None,
) -> DiffusionScores:
    """Diffusion loss, masked loss and masked accuracy of an adapted model on held-out blocks.

    Args:
        model: adapted (:func:`diffullama_ext.integrations.adapt`), on any device.
        blocks: [N, L] int32 or int64, held-out tokens; sequence i of the estimates is block i.
        config: the draws; None is ``EvaluationConfig()``.
        mask_id, shift: of the model (``DiffusionConfig.of(model)``). With the shift token 0 of a block is never scored.
        maskable, attention_mask, document_ids: [N, L], as of :class:`DiffusionObjective`: prompts and padding are
            neither noised nor scored nor counted.
        block_length: of block diffusion: a noised block is predicted from itself and the clean blocks before it. All
            blocks of a sequence have one level, so the figures are by t as without blocks; since no block sees another
            one noised, their sum has the expectation that a level for each block gives.
        diffusion_mask: attention of the evaluation of whole sequences; None is bidirectional.
        progress: called after each batch.

    Source: Sahoo et al., "Simple and Effective Masked Diffusion Language Models" (NeurIPS 2024), the continuous-time
    bound for alpha_t = 1 - t, here per token and with stratified t; Arriola et al. (ICLR 2025) for blocks.
    """
    heldout = Heldout(blocks, maskable, attention_mask, document_ids).checked()
    config = EvaluationConfig() if config is None else config
    check_attention(model)
    if block_length is not None:
        check_int("block_length", block_length, 1, 2**31 - 1)
        if diffusion_mask is not None:
            raise ValueError(f"diffusion_mask must be None with block_length={block_length}, whose mask is its own")
    device = next(model.parameters()).device
    objective = DiffusionObjective(ObjectiveConfig(mask_id, shift=shift))
    scorer = _Scorer(model, objective, config.seed, block_length, diffusion_mask)
    batches = heldout.split(config.batch_size, device)
    elbo: list[tuple[Tensor, Tensor]] = []
    by_draw: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.draws)]
    loss: dict[float, list[tuple[Tensor, Tensor]]] = {t: [] for t in config.times}
    accuracy: dict[float, list[tuple[Tensor, Tensor]]] = {t: [] for t in config.times}
    with evaluating(model):
        for done, batch in enumerate(batches, start=1):
            size = len(batch.blocks)
            number = torch.arange(size, device=device) + (done - 1) * config.batch_size
            weighted = torch.zeros(size, dtype=torch.float64, device=device)
            for draw in range(config.draws):
                index = number * config.draws + draw
                t = draw_t(index, config.seed, t_min=config.t_min, strata=config.draws)
                nll, _, count, scorable = scorer(batch, index, t)
                by_draw[draw].append((nll, count))
                weighted += nll / t.double()
            elbo.append((weighted, config.draws * scorable))
            for level in config.times:
                nll, hits, count, _ = scorer(batch, number, torch.full((size,), level, device=device))
                loss[level].append((nll, count))
                accuracy[level].append((hits, count))
            if progress is not None:
                progress(done, len(batches))
    return DiffusionScores(
        concatenated(elbo),
        {level: concatenated(parts) for level, parts in loss.items()},
        {level: concatenated(parts) for level, parts in accuracy.items()},
        {_bin(draw, config): concatenated(parts) for draw, parts in enumerate(by_draw)},
    )


def _bin(draw: int, config: EvaluationConfig) -> tuple[float, float]:
    """The levels that a draw takes: draw_t's stratum of that number, counted from t = 1 down."""
    width = (1.0 - config.t_min) / config.draws
    return (1.0 - (draw + 1) * width, 1.0 - draw * width)
