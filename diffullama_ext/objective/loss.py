# SPDX-License-Identifier: Apache-2.0
"""The masked diffusion loss of a model.

Source: Algorithm 1 of Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models" (ICLR
2025); the variants name theirs where they are computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import LossStats, linear_shifted_cross_entropy
from ..functional.random import index_tensor
from ..functional.shifted_cross_entropy import normalized, sequence_weight
from .config import ObjectiveConfig
from .distillation import TeacherTopK, teacher_top_k, top_k_divergence
from .model_forward import Score, check_ids, forward_to_score
from .noising import noise, targets, token_weight
from .streams import Attending, Streams, streams_of


class ObjectiveOutput(NamedTuple):
    """What one call of the objective computed. N = B, or 2 B with two views: the first views, then the second ones."""

    loss: Tensor  # scalar
    stats: LossStats  # sums, for averages over micro-batches and ranks; weighted_sum includes the distillation
    masked: Tensor  # [N, L] bool, the scored tokens
    t: Tensor  # [N] or [N, blocks] float32


class NoisedBatch(NamedTuple):
    """A noised batch and what of it is scored; N = B, or 2 B with two views."""

    x0: Tensor  # [N, L] int64
    xt: Tensor  # [N, L] int64
    scored: Tensor  # [N, L] bool, noised tokens that a logits row predicts
    scorable: Tensor  # [N, L] bool, tokens that could have been scored
    loss_weight: Tensor  # [N, L] float32
    t: Tensor  # [N] or [N, blocks] float32


def _counts_for_host(batch: NoisedBatch) -> Callable[[], tuple[int | None, bool]]:
    """Start bringing two facts to the host; the result reads them.

    They are the number of scored tokens, None where the op may ask itself, and whether none is nor could be scored. On
    CUDA the copy is queued before the model's forward and read after: the wait ends while the forward still runs, so
    the device never idles.
    """
    scored, scorable = batch.scored, batch.scorable
    if torch.compiler.is_compiling():  # a number would be a constant of the graph
        return lambda: (None, False)
    if scored.device.type != "cuda":
        is_empty = not bool((scored | scorable).any())
        return lambda: (None, is_empty)
    if torch.cuda.is_current_stream_capturing():  # replays have other counts: bound them all
        return lambda: (scored.numel(), False)
    counts = torch.empty(2, dtype=torch.int64, pin_memory=True)
    counts.copy_(torch.stack([scored.sum(), scorable.sum()]), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(scored.device))

    def read() -> tuple[int | None, bool]:
        copied.synchronize()
        n_scored, n_scorable = counts.tolist()
        return n_scored, n_scored == 0 and n_scorable == 0

    return read


class DiffusionObjective:
    """The masked diffusion loss of a model adapted with :func:`diffullama_ext.integrations.adapt`.

    ``objective(model, x0, seed=seed, step=step)`` draws the noise, calls ``model``, which may be wrapped (DDP, FSDP2,
    peft), and computes the loss from the last hidden states and the head's weight, never holding the logits [B, L, V].
    The loss is computed inside the model's forward and is what the (wrapped) forward returns, so wrappers that gather
    parameters or synchronise gradients see an ordinary loss.

    A batch with no token to score (all prompt or padding) has loss 0 and gradients 0. It is counted in
    ``n_empty_batches`` and a warning gives the count, at 1, 2, 4, 8, ... of them. Its forward still runs: on several
    ranks each must take part in the others' collectives.

    Args:
        config: which loss.
        teacher: an adapted model with the student's vocabulary, in evaluation mode; for ``distill_weight`` > 0.
    """

    def __init__(self, config: ObjectiveConfig, teacher: nn.Module | None = None) -> None:
        if config.distill_weight > 0 and teacher is None:
            raise ValueError(f"teacher must be given with distill_weight={config.distill_weight}, got None")
        if teacher is not None and config.distill_weight == 0:
            raise ValueError("distill_weight must be above 0 with a teacher, got 0")
        if teacher is not None and teacher.training:
            raise ValueError("teacher must be in evaluation mode; call teacher.eval()")
        self.config = config
        self.teacher = teacher
        self.n_empty_batches = 0

    def __call__(
        self,
        model: nn.Module,
        x0: Tensor,
        *,
        maskable: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        attn_mask_ratio: float | Tensor = 1.0,
        seed: int | Tensor,
        step: int | Tensor = 0,
        sample_index: Tensor | None = None,
        t: Tensor | None = None,
        normalizer: str | float | Tensor | None = None,
    ) -> ObjectiveOutput:
        """The loss of one batch; (seed, step, sample_index) give the same noise in any batch and on any device.

        Args:
            model: an adapted model, or a wrapper of one.
            x0: [B, L] int64 clean tokens.
            maskable: [B, L] bool, False protects prompts; None means all.
            attention_mask: [B, L] bool or int, 0 for padding (on either side; with blocks on the right), which is not
                scored; None means none.
            document_ids: [B, L] int64, the documents of a packed sequence: they do not attend to each other, positions
                start from 0 in each, and with the shift the first token of each is not scored; None packs without.
            attn_mask_ratio: 0 causal ... 1 bidirectional, or float32 [1] on the device.
            seed, step: ints or int64 [1]; t and the noise depend on (seed, sample_index), the attention mask on
                (seed, step). The block length depends on step, which then must be an int while it grows.
            sample_index: [B] int64 global numbers of the sequences; None means 0..B-1.
            t: float32 noise levels in (0, 1], [B] or [B, blocks] (both views' for "nested"); None draws them.
            normalizer: a name, or the denominator itself (its sum over ranks and micro-batches); None: the config's.
        """
        check_ids(model, self.config)
        block_length = self._block_length(step)
        batch = self.noise(
            x0,
            maskable=maskable,
            attention_mask=attention_mask,
            document_ids=document_ids,
            seed=seed,
            step=step,
            sample_index=sample_index,
            t=t,
        )
        counts = _counts_for_host(batch)
        how = Attending(attention_mask, document_ids, attn_mask_ratio, seed, step)
        streams = streams_of(batch.xt, batch.x0, how, block_length, self.config.shift)
        teacher = None if self.teacher is None else self._teach(batch, how, block_length)
        normalizer = self.config.normalizer if normalizer is None else normalizer
        score = self._score(batch, streams, counts, teacher, normalizer)
        loss, *stats = forward_to_score(model, streams.inputs, score)
        if counts()[1]:
            self._count_empty_batch()
        return ObjectiveOutput(loss, LossStats(*stats), batch.scored, batch.t)

    def denominator(
        self,
        x0: Tensor,
        *,
        maskable: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        seed: int | Tensor,
        step: int | Tensor = 0,
        sample_index: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """What the config's normalizer divides this batch by, int64 scalar, before any model runs.

        Sums of it over micro-batches and ranks make a loss that no split of the batch changes: the gradient of
        ``stats.weighted_sum / total`` summed over all of them. ``step`` matters while the block length grows.
        """
        n_views = self.config.n_views
        if self.config.normalizer in ("sequence", "batch"):
            return torch.full((), n_views * x0.shape[0], device=x0.device)
        if self.config.normalizer == "tokens":
            maskable, predicted = self._targets(x0, maskable, attention_mask, document_ids)
            return n_views * (maskable & predicted).sum()
        batch = self.noise(
            x0,
            maskable=maskable,
            attention_mask=attention_mask,
            document_ids=document_ids,
            seed=seed,
            step=step,
            sample_index=sample_index,
            t=t,
        )
        return batch.scored.sum()

    # --- noise --------------------------------------------------------------------------------------------------------

    def _block_length(self, step: int | Tensor) -> int | None:
        lengths = self.config.block_lengths()
        if lengths is None:
            return None
        if isinstance(step, Tensor) and lengths.steps:
            raise TypeError("step must be an int while the block length grows (block_length_steps > 0), got a tensor")
        return lengths.final if isinstance(step, Tensor) else lengths(step)

    def _targets(
        self, x0: Tensor, maskable: Tensor | None, attention_mask: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if document_ids is not None and self.config.loss_weight == "cart":
            raise ValueError("document_ids must be None with loss_weight='cart', whose weights look across documents")
        return targets(x0, maskable, attention_mask, document_ids, shift=self.config.shift)

    def noise(
        self,
        x0: Tensor,
        *,
        maskable: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        seed: int | Tensor,
        step: int | Tensor = 0,
        sample_index: Tensor | None = None,
        t: Tensor | None = None,
    ) -> NoisedBatch:
        """What a call with these arguments noises and scores, for a loop with a model or loss of its own.

        With ``linear_shifted_cross_entropy(hidden, weight, batch.x0, batch.scored, loss_weight=batch.loss_weight,
        maskable=batch.scorable, shift=config.shift, normalizer=config.normalizer)`` it gives the objective's loss (but
        for blocks, whose rows are in two streams).
        """
        config = self.config
        maskable, predicted = self._targets(x0, maskable, attention_mask, document_ids)
        sample_index = index_tensor("sample_index", sample_index, x0.shape[0], x0.device)
        noised = noise(config, x0, maskable, seed, sample_index, t, self._block_length(step))
        real = torch.ones_like(maskable) if attention_mask is None else attention_mask.bool()
        x0, maskable, predicted, real = (x.repeat(config.n_views, 1) for x in (x0, maskable, predicted, real))
        scored = noised.xt == config.mask_id if config.loss_mask == "equality" else noised.noised
        loss_weight = token_weight(config, noised, real)
        return NoisedBatch(x0, noised.xt, scored & predicted, maskable & predicted, loss_weight, noised.t)

    # --- forward ------------------------------------------------------------------------------------------------------

    def _score(
        self,
        batch: NoisedBatch,
        streams: Streams,
        counts: Callable[[], tuple[int | None, bool]],
        teacher: TeacherTopK | None,
        normalizer: str | float | Tensor,
    ) -> Score:
        shift = self.config.shift and streams.rows is None

        def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, ...]:
            max_scored = None if torch.compiler.is_compiling() else counts()[0]
            loss, stats = linear_shifted_cross_entropy(
                hidden if streams.rows is None else hidden.index_select(1, streams.rows),
                weight,
                batch.x0,
                batch.scored,
                loss_weight=batch.loss_weight,
                bias=bias,
                maskable=batch.scorable,
                shift=shift,
                normalizer=normalizer,
                softcap=softcap,
                max_scored=max_scored,
            )
            if teacher is None:
                return (loss, *stats)
            divergence = self._divergence(batch, streams, teacher, normalizer, (hidden, weight, bias, softcap))
            stats = stats._replace(weighted_sum=stats.weighted_sum + self.config.distill_weight * divergence)
            return (normalized(stats, normalizer, batch.scored, batch.scorable, shift), *stats)

        return score

    def _count_empty_batch(self) -> None:
        self.n_empty_batches += 1
        if self.n_empty_batches & (self.n_empty_batches - 1) == 0:
            warnings.warn(
                f"a batch has no token that may be masked and scored; its loss is 0 ({self.n_empty_batches} so far)",
                stacklevel=2,
            )

    # --- distillation -------------------------------------------------------------------------------------------------

    def _teach(self, batch: NoisedBatch, how: Attending, block_length: int | None) -> TeacherTopK:
        """The teacher on the same noised tokens, bidirectional, at the scored tokens in row-major order."""
        config = self.config
        shift = config.shift if config.teacher_shift is None else config.teacher_shift
        if block_length is not None and config.teacher_block_length is not None:
            block_length = config.teacher_block_length
        streams = streams_of(batch.xt, batch.x0, how._replace(ratio=1.0), block_length, shift)
        vocab: list[int] = []

        def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, ...]:
            rows = streams.predicting(batch.scored, hidden, shift)
            vocab.append(weight.shape[0])
            return teacher_top_k(
                rows,
                weight,
                bias,
                softcap,
                top_k=config.distill_top_k,
                temperature=config.distill_temperature,
                forbid=config.mask_id,
            )

        assert self.teacher is not None
        with torch.no_grad():
            ids, probs = forward_to_score(self.teacher, streams.inputs, score)
        return TeacherTopK(ids, probs, vocab[0])

    def _divergence(
        self,
        batch: NoisedBatch,
        streams: Streams,
        teacher: TeacherTopK,
        normalizer: str | float | Tensor,
        head: tuple[Tensor, Tensor, Tensor | None, float | None],
    ) -> Tensor:
        """The sum over scored tokens, unweighted but for what the normaliser "sequence" asks."""
        hidden, weight, bias, softcap = head
        shift = self.config.shift
        row_weight = torch.ones_like(batch.loss_weight)
        if isinstance(normalizer, str) and normalizer == "sequence":
            row_weight = sequence_weight(row_weight, batch.scored, batch.scorable, shift)
        rows = streams.predicting(batch.scored, hidden, shift)
        row_weight = row_weight[batch.scored]
        temperature = self.config.distill_temperature
        return top_k_divergence(rows, weight, bias, softcap, teacher, row_weight, temperature=temperature)
