# SPDX-License-Identifier: Apache-2.0
"""Figures of a run, from its trace, and of a set of texts. Tensors are on one device; T frames, B rows, L positions.

The trace's come from "Measuring temporal linguistic emergence" (arXiv 2604.23235) and Prophet (arXiv 2508.19982), whose
exact formulas were not published; those here are ours, and given with each function.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, check_range, check_tensor
from .trace import Trace

Tokens = Sequence[Hashable]  # ids, words or characters


def commitment_step(prediction: Tensor) -> Tensor:
    """First frame from which a position's prediction stays what it is at the end, int64 [B, L].

    min {s : prediction[u] = prediction[T - 1] for all u >= s}. A prediction may settle before its token is committed
    (``Trace.commit_step``): the difference is what parallel decoding has to gain.

    Args:
        prediction: int [T, B, L], such as ``trace.history().prediction``.
    """
    check_tensor("prediction", prediction, (torch.int32, torch.int64), ("T", "B", "L"))
    return _settled(prediction == prediction[-1:])


def early_answer_step(prediction: Tensor, answer: Tensor, region: Tensor) -> Tensor:
    """First frame from which all of a row's answer is predicted right until the end, int64 [B]; -1 where never.

    min {s : prediction[u, j] = answer[j] for all j in the region and u >= s}. Over T, it is the share of the run that
    had to be waited for (Prophet's early answers).

    Args:
        prediction: int [T, B, L]. answer: int [B, L], read inside the region.
        region: bool [B, L]; a row without one has its answer from frame 0.
    """
    check_tensor("prediction", prediction, (torch.int32, torch.int64), ("T", "B", "L"))
    check_tensor("answer", answer, (torch.int32, torch.int64), tuple(prediction.shape[1:]))
    check_tensor("region", region, torch.bool, tuple(prediction.shape[1:]))
    right = ((prediction == answer) | ~region).all(dim=2)  # [T, B]
    return torch.where(right[-1], _settled(right), -1)


def _settled(holds: Tensor) -> Tensor:
    """First index of dim 0 from which ``holds`` is True to the end; its size where the last is False."""
    return len(holds) - holds.flip(0).cumprod(dim=0).sum(dim=0)


class RemaskDrop(NamedTuple):
    """What re-masking after one frame cost, in accuracy (0 to 1)."""

    step: int  # the step it was done after
    n_remasked: int
    direct: float  # lost on the re-masked positions; NaN where none was
    collateral: float  # lost on the other positions to fill; NaN where there is none


def remask_sensitivity(
    trace: Trace,
    complete: Callable[[Tensor, Tensor], Tensor],
    answer: Tensor,
    *,
    fraction: float = 0.5,
    seed: int = 0,
) -> list[RemaskDrop]:
    """Mask part of what is committed again after each frame, finish the run from there, and compare.

    drop = accuracy of the recorded run - accuracy of the finished one, over the re-masked positions (direct) and over
    the others that were to fill (collateral). A frame without commits re-masks nothing and drops nothing.

    Args:
        trace: of the run.
        complete: (xt int64 [B, L], masked bool [B, L]) -> int64 [B, L] without masks; deterministic, such as greedy
            :func:`fill` with the run's denoiser and policy.
        answer: int64 [B, L], right tokens of the positions to fill.
        fraction: of the committed positions, each drawn with this probability. seed: of these draws.
    """
    check_range("fraction", fraction, 0.0, 1.0, low_open=True)
    history, maskable = trace.history(), trace.maskable
    check_tensor("answer", answer, torch.int64, tuple(maskable.shape))
    answer = answer.cpu()
    before = history.xt[-1] == answer
    generator = torch.Generator().manual_seed(seed)
    drops = []
    for step, xt, masked in zip(history.step.tolist(), history.xt.long(), history.masked, strict=True):
        drawn = torch.rand(maskable.shape, generator=generator) < fraction
        remasked = maskable & ~masked & drawn
        again = masked | remasked
        finished = complete(torch.where(again, trace.mask_id, xt), again).cpu()
        lost = before.double() - (finished == answer).double()
        direct, collateral = (float(lost[where].mean()) for where in (remasked, maskable & ~remasked))
        drops.append(RemaskDrop(step, int(remasked.sum()), direct, collateral))
    return drops


class Calibration(NamedTuple):
    """How far confidences are probabilities of being right."""

    ece: float  # expected calibration error
    brier: float  # mean (confidence - right)^2
    auc: float  # that a right one is more confident than a wrong one; NaN unless there are both
    counts: Tensor  # int64 [bins]
    confidence: Tensor  # float64 [bins], mean; NaN in empty bins
    accuracy: Tensor  # float64 [bins]


def calibration(confidence: Tensor, correct: Tensor, *, bins: int = 10) -> Calibration:
    """Confidence against correctness of n tokens.

    ECE = sum over bins of (n_bin / n) |accuracy - confidence|, equal-width bins, b/bins < confidence <= (b+1)/bins
    (Guo et al., ICML 2017). Brier (1950). AUC = P(c_right > c_wrong) + P(equal) / 2 (Mann-Whitney).

    Args:
        confidence: float [n] in [0, 1]. correct: bool [n].
    """
    check_tensor("confidence", confidence, (torch.float32, torch.float64), ("n",))
    check_tensor("correct", correct, torch.bool, tuple(confidence.shape))
    check_int("bins", bins, 1, 2**20)
    if len(confidence) == 0 or not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidence must be at least one value, all in [0, 1], got {confidence}")
    confidence, right = confidence.double(), correct.double()
    place = ((confidence * bins).ceil().long() - 1).clamp(min=0)
    counts = torch.bincount(place, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64, device=counts.device)
    sums.index_add_(1, place, torch.stack((confidence, right)))
    means = sums / counts
    ece = float((sums[0] - sums[1]).abs().sum() / len(confidence))
    brier = float((confidence - right).square().mean())
    return Calibration(ece, brier, _auc(confidence, correct), counts, means[0], means[1])


def _auc(score: Tensor, positive: Tensor) -> float:
    _, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0).double() - (counts - 1) / 2.0  # mean rank of equal scores, from 1
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return math.nan
    rank_sum = float(rank[inverse][positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def ngram_entropy(texts: Sequence[Tokens], n: int = 1) -> float:
    """Entropy of the n-grams of a set of texts, nats: -sum p(g) log p(g), p the share of g in all n-grams.

    Falls where decoding repeats itself (arXiv 2605.12522). Texts shorter than n have none; NaN where no text has one.
    """
    counts = Counter(gram for text in texts for gram in _ngrams(text, n))
    total = counts.total()
    return -sum(c / total * math.log(c / total) for c in counts.values()) if total else math.nan


def distinct_n(texts: Sequence[Tokens], n: int = 2) -> float:
    """Different n-grams over all n-grams of a set of texts, in (0, 1] (Li et al., NAACL 2016); NaN without any."""
    counts = Counter(gram for text in texts for gram in _ngrams(text, n))
    return len(counts) / counts.total() if counts else math.nan


def repetition(texts: Sequence[Tokens], n: int = 4) -> float:
    """Mean over texts of 1 - different n-grams / n-grams of that text (seq-rep-n, Welleck et al., ICLR 2020).

    0 where no text repeats itself. Texts shorter than n do not count; NaN where all are.
    """
    shares = [1 - distinct_n([text], n) for text in texts if len(text) >= n]
    return sum(shares) / len(shares) if shares else math.nan


def _ngrams(text: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    check_int("n", n, 1, 2**31 - 1)
    return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))
