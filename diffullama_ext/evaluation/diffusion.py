# SPDX-License-Identifier: Apache-2.0
"""What a masked diffusion model is worth on held-out blocks, under noise that is the same for every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..attention_mask import AttentionMask
from ..checks import check_range, check_tensor
from ..objective import draw_t
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
        check_range("draws", self.draws, 1, 2**31 - 1)
        check_range("batch_size", self.batch_size, 1, 2**31 - 1)
        check_range("t_min", self.t_min, 0.0, 1.0, low_open=True)
        for t in self.times:
            check_range("times", t, 0.0, 1.0, low_open=True)


@dataclass(frozen=True)
class DiffusionScores:
    """Held-out figures; the losses in nats.

    Attributes:
        diffusion_loss: E_t[(1/t) * sum of nll over the masked] per token: the ELBO, an upper bound of the negative
            log-likelihood (exact but for the t below t_min).
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


def check_blocks(blocks: Tensor) -> None:
    """At least one block of at least two tokens."""
    check_tensor("blocks", blocks, (torch.int32, torch.int64), ("N", "L"))
    if blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise ValueError(f"blocks must be at least [1, 2], got {list(blocks.shape)}")


def masked_scores(model: Any, x0: Tensor, xt: Tensor, scored: Tensor, *, shift: bool, **forward: Any) -> Tensor:
    """For every scored token, in row-major order: its negative log-likelihood, and whether it has the largest logit.

    Args:
        model: a causal language model of transformers, adapted or not.
        x0, xt: [B, L] int64 clean and noised tokens.
        scored: [B, L] bool; with the shift no entry of column 0.
        shift: logits row i scores token i+1.
        forward: more arguments of the model's forward.

    Returns:
        float32 [2, N]: nll, and 1 or 0.
    """
    hidden = model.base_model(input_ids=xt, use_cache=False, **forward).last_hidden_state  # [B, L, H]
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    rows = hidden[:, :-1][scored[:, 1:]] if shift else hidden[scored]  # [N, H], those that predict the scored tokens
    target = x0[scored]
    scores = []
    chunk = max(1, LOGITS_ALIVE // head.weight.shape[0])
    for start in range(0, len(rows), chunk):
        logits = head(rows[start : start + chunk]).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        ids = target[start : start + chunk]
        nll = nn.functional.cross_entropy(logits, ids, reduction="none")
        scores.append(torch.stack([nll, (logits.argmax(dim=1) == ids).float()]))
    return torch.cat(scores, dim=1) if scores else hidden.new_zeros((2, 0), dtype=torch.float32)


@dataclass(frozen=True)
class _Scorer:
    """One model under one kind of noise."""

    model: Any
    mask_id: int
    shift: bool
    seed: int
    diffusion_mask: AttentionMask | None

    def __call__(self, x0: Tensor, sample_index: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise x0 [B, L] at t [B]; returns, by sequence, the sums of nll and hits and the scored tokens, [B]."""
        noised = functional.mask_tokens(x0, t, mask_id=self.mask_id, seed=self.seed, sample_index=sample_index)
        scored = noised.masked.clone()
        if self.shift:
            scored[:, 0] = False
        scores = masked_scores(self.model, x0, noised.xt, scored, shift=self.shift, diffusion_mask=self.diffusion_mask)
        by_token = torch.zeros((2, *scored.shape), dtype=torch.float64, device=x0.device)
        by_token[:, scored] = scores.double()
        nll, hits = by_token.sum(dim=2)
        return nll, hits, scored.sum(dim=1)


def diffusion_scores(
    model: Any,
    blocks: Tensor,
    config: EvaluationConfig | None = None,
    *,
    mask_id: int,
    shift: bool,
    diffusion_mask: AttentionMask | None = None,
    progress: Progress | None = None,
) -> DiffusionScores:
    """Diffusion loss, masked loss and masked accuracy of an adapted model on held-out blocks.

    Args:
        model: adapted (:func:`diffullama_ext.integrations.adapt`), on any device.
        blocks: [N, L] int32 or int64, held-out tokens; sequence i of the estimates is block i.
        config: the draws; None is ``EvaluationConfig()``.
        mask_id, shift: of the model (``DiffusionConfig.of(model)``). With the shift token 0 of a block is never scored.
        diffusion_mask: attention of the evaluation; None is bidirectional.
        progress: called after each batch.

    Source: Sahoo et al., "Simple and Effective Masked Diffusion Language Models" (NeurIPS 2024), the continuous-time
    bound for alpha_t = 1 - t, here per token and with stratified t.
    """
    check_blocks(blocks)
    config = EvaluationConfig() if config is None else config
    device = next(model.parameters()).device
    scorer = _Scorer(model, mask_id, shift, config.seed, diffusion_mask)
    batches = torch.arange(len(blocks)).split(config.batch_size)
    elbo: list[tuple[Tensor, Tensor]] = []
    by_draw: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.draws)]
    loss: dict[float, list[tuple[Tensor, Tensor]]] = {t: [] for t in config.times}
    accuracy: dict[float, list[tuple[Tensor, Tensor]]] = {t: [] for t in config.times}
    with evaluating(model):
        for done, rows in enumerate(batches, start=1):
            x0, number = blocks[rows].long().to(device), rows.to(device)
            weighted = torch.zeros(len(rows), dtype=torch.float64, device=device)
            for draw in range(config.draws):
                index = number * config.draws + draw
                t = draw_t(index, config.seed, t_min=config.t_min, strata=config.draws)
                nll, _, count = scorer(x0, index, t)
                by_draw[draw].append((nll, count))
                weighted += nll / t.double()
            elbo.append((weighted, torch.full_like(weighted, config.draws * (x0.shape[1] - int(shift)))))
            for level in config.times:
                nll, hits, count = scorer(x0, number, torch.full((len(rows),), level, device=device))
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
