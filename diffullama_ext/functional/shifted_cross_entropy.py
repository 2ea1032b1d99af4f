# SPDX-License-Identifier: Apache-2.0
"""The masked, shifted, weighted cross-entropy, from logits or from hidden states."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from .._library import use_kernel
from ..checks import FLOATS, check_choice, check_int, check_range, check_tensor

NORMALIZERS = ("tokens", "masked", "sequence", "batch")
REDUCTIONS = ("mean", "sum", "none")


class LossStats(NamedTuple):
    """Sums that make any average, across micro-batches and ranks."""

    weighted_sum: Tensor  # sum of loss_weight * nll over the scored tokens; scalar, differentiable
    nll_sum: Tensor  # sum of nll over the scored tokens; scalar, detached
    n_scored: Tensor  # number of scored tokens; scalar int64


def _check_targets(lead: Tensor, x0: Tensor, masked: Tensor, label_smoothing: float, softcap: float | None) -> None:
    batch, length = lead.shape[:2]
    check_tensor("x0", x0, torch.int64, (batch, length), lead.device)
    check_tensor("masked", masked, torch.bool, (batch, length), lead.device)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    if softcap is not None:
        check_range("softcap", softcap, 0.0, math.inf, low_open=True)


def _token_weight(loss_weight: Tensor | None, masked: Tensor, dtype: torch.dtype) -> Tensor:
    """loss_weight as [B, L] of ``dtype``."""
    batch, length = masked.shape
    if loss_weight is None:
        return torch.ones((batch, length), dtype=dtype, device=masked.device)
    by_token = isinstance(loss_weight, Tensor) and loss_weight.dim() == 2
    shape = (batch, length) if by_token else (batch,)
    check_tensor("loss_weight", loss_weight, (torch.float32, torch.float64), shape, masked.device)
    if loss_weight.requires_grad:
        raise ValueError("loss_weight must not require grad; it weights the loss and is not trained")
    return (loss_weight if by_token else loss_weight[:, None].expand(batch, length)).to(dtype)


def _scorable(masked: Tensor, maskable: Tensor | None, shift: bool) -> Tensor:
    """[B] float: tokens of each sequence that could be scored. With the shift no row predicts position 0."""
    if maskable is not None:
        check_tensor("maskable", maskable, torch.bool, tuple(masked.shape), masked.device)
        return reference.shifted_cross_entropy.scored_tokens(maskable, shift).sum(dim=1)
    batch, length = masked.shape
    return torch.full((batch,), max(length - int(shift), 0), device=masked.device)


def normalized(
    stats: LossStats, normalizer: str | float | Tensor, masked: Tensor, maskable: Tensor | None, shift: bool
) -> Tensor:
    """weighted_sum over its normaliser; a normaliser of 0 (nothing to score) gives 0, never NaN."""
    if isinstance(normalizer, str):
        check_choice("normalizer", normalizer, NORMALIZERS)
        if normalizer == "masked":
            denominator = stats.n_scored
        elif normalizer == "tokens":
            denominator = _scorable(masked, maskable, shift).sum()
        else:  # "sequence" has its share of the row weights already
            return stats.weighted_sum / max(masked.shape[0], 1)
        return stats.weighted_sum / denominator.clamp(min=1)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, got {list(normalizer.shape)}")
        normalizer = normalizer.reshape(()).masked_fill(normalizer.reshape(()) == 0, 1)
    else:
        check_range("normalizer", normalizer, 0.0, math.inf, low_open=True)
    return stats.weighted_sum / normalizer


def sequence_weight(weight: Tensor, masked: Tensor, maskable: Tensor | None, shift: bool) -> Tensor:
    """[B, L] weights that make the normaliser "sequence" a division by B: each over its sequence's "tokens" count."""
    return weight / _scorable(masked, maskable, shift).clamp(min=1)[:, None]


def shifted_cross_entropy(
    logits: Tensor,
    x0: Tensor,
    masked: Tensor,
    *,
    loss_weight: Tensor | None = None,
    maskable: Tensor | None = None,
    shift: bool = True,
    normalizer: str | float | Tensor = "tokens",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, LossStats]:
    """Weighted cross-entropy of the masked tokens, from logits.

    A token (b, j) is scored where ``masked`` and, with the shift, j >= 1: logits row j-1 predicts it (row j without the
    shift). With w its loss_weight and nll its negative log-likelihood in float32 (float64 for float64 logits),
    reduction "none" returns w * nll as [B, L] (0 where nothing is scored), "sum" its sum, and "mean" the sum over

    ============== ==================================================================================================
    normalizer     denominator
    ============== ==================================================================================================
    "tokens"       tokens that could be scored: maskable, and j >= 1 with the shift. With w = 1/t the ELBO per token
    "masked"       tokens scored (the released DiffuLLaMA code)
    "sequence"     each sequence's own "tokens" count, then B: the mean over sequences
    "batch"        B
    number, tensor itself; for counts taken over ranks and accumulation steps
    ============== ==================================================================================================

    Nothing scored gives 0 with zero gradients. Ids outside [0, V) matter at scored positions only: IndexError on the
    CPU, NaN on CUDA.

    Args:
        logits: [B, L, V] float.
        x0: [B, L] int64 clean tokens.
        masked: [B, L] bool, the draw of :func:`mask_tokens`.
        loss_weight: [B] or [B, L] float, 1/t for the linear schedule; None means 1. No gradient.
        maskable: [B, L] bool, used by the normalisers "tokens" and "sequence"; None means all.
        shift: logits row i predicts token i+1 (an adapted AR model).
        label_smoothing: as in torch.nn.functional.cross_entropy.
        softcap: logits become softcap * tanh(logits / softcap).

    Returns:
        (loss, LossStats).
    """
    check_tensor("logits", logits, FLOATS, ("B", "L", "V"))
    _check_targets(logits, x0, masked, label_smoothing, softcap)
    check_choice("reduction", reduction, REDUCTIONS)
    backend = ops if use_kernel("shifted_cross_entropy", logits.device, impl) else reference
    nll = backend.shifted_cross_entropy.shifted_cross_entropy(
        logits, x0, masked, shift, label_smoothing, softcap or 0.0
    )
    return _reduced(nll, masked, loss_weight, maskable, shift, normalizer, reduction)


def _reduced(
    nll: Tensor,
    masked: Tensor,
    loss_weight: Tensor | None,
    maskable: Tensor | None,
    shift: bool,
    normalizer: str | float | Tensor,
    reduction: str,
) -> tuple[Tensor, LossStats]:
    """Reduction of per-token losses [B, L]."""
    weight = _token_weight(loss_weight, masked, nll.dtype)
    if reduction == "mean" and isinstance(normalizer, str) and normalizer == "sequence":
        weight = sequence_weight(weight, masked, maskable, shift)
    scored = reference.shifted_cross_entropy.scored_tokens(masked, shift)
    weighted = torch.where(scored, weight * nll, 0.0)  # an infinite weight where nothing is scored must not make NaN
    stats = LossStats(weighted.sum(), nll.detach().sum(), scored.sum())
    if reduction == "none":
        return weighted, stats
    loss = stats.weighted_sum if reduction == "sum" else normalized(stats, normalizer, masked, maskable, shift)
    return loss, stats


def _within_bound(nll: Tensor, masked: Tensor, shift: bool, max_scored: int | None) -> Tensor:
    """The reference computes every row, so it needs no bound; what a kernel says to one too small, it says too."""
    if max_scored is None:
        return nll
    n_scored = reference.shifted_cross_entropy.scored_tokens(masked, shift).sum()
    if nll.device.type != "cpu":
        return nll.masked_fill(n_scored > max_scored, torch.nan)
    if n_scored > max_scored:
        raise ValueError(f"max_scored must be at least the {int(n_scored)} scored tokens, got {max_scored}")
    return nll


def linear_shifted_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    x0: Tensor,
    masked: Tensor,
    *,
    loss_weight: Tensor | None = None,
    bias: Tensor | None = None,
    maskable: Tensor | None = None,
    shift: bool = True,
    normalizer: str | float | Tensor = "tokens",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    accum_dtype: torch.dtype = torch.float32,
    chunk_rows: int | None = None,
    max_scored: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, LossStats]:
    """:func:`shifted_cross_entropy` of ``hidden @ lm_head_weight.T + bias``, without the logits.

    Only the rows that predict a masked token are computed, ``chunk_rows`` at a time, with one chunk of logits alive.
    For "mean" and "sum" the gradients are made in the forward, so nothing is computed twice ("none" computes the
    logits again in the backward). The gradients of weight and bias accumulate in ``accum_dtype``.

    Args:
        hidden: [B, L, H] float, the last hidden states. Under autocast cast to its dtype, with weight and bias.
        lm_head_weight: [V, H]; bias: [V]; of hidden's dtype.
        accum_dtype: float32 or float64 (raised to float64 for float64 inputs).
        chunk_rows: rows of logits alive at once; None chooses by V. The loss does not depend on it beyond rounding.
        max_scored: a number that the scored tokens do not exceed, known to the host; on CUDA it spares asking the
            device, which waits for the model, and makes the op capturable. Too small a one raises on the CPU and gives
            NaN on CUDA.
        The rest as in :func:`shifted_cross_entropy`.

    Returns:
        (loss, LossStats).
    """
    check_tensor("hidden", hidden, FLOATS, ("B", "L", "H"))
    device = hidden.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_tensor("lm_head_weight", lm_head_weight, hidden.dtype, ("V", hidden.shape[2]), device)
    if bias is not None:
        check_tensor("bias", bias, hidden.dtype, (lm_head_weight.shape[0],), device)
    _check_targets(hidden, x0, masked, label_smoothing, softcap)
    check_choice("reduction", reduction, REDUCTIONS)
    if accum_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"accum_dtype must be torch.float32 or torch.float64, got {accum_dtype}")
    if chunk_rows is not None:
        check_int("chunk_rows", chunk_rows, 1, 2**31 - 1)
    if max_scored is not None:
        check_int("max_scored", max_scored, 0, 2**63 - 1)
    cap, bound = softcap or 0.0, -1 if max_scored is None else max_scored
    if not use_kernel("linear_shifted_cross_entropy", device, impl):
        nll = reference.shifted_cross_entropy.linear_shifted_cross_entropy(
            hidden, lm_head_weight, bias, x0, masked, shift, label_smoothing, cap
        )
        nll = _within_bound(nll, masked, shift, max_scored)
        return _reduced(nll, masked, loss_weight, maskable, shift, normalizer, reduction)
    backend = ops.shifted_cross_entropy
    wide = torch.promote_types(hidden.dtype, torch.float32)
    accum_dtype = torch.promote_types(accum_dtype, wide)
    if reduction == "none":
        nll = backend.linear_shifted_nll(
            hidden, lm_head_weight, bias, x0, masked, shift, label_smoothing, cap, chunk_rows or 0, accum_dtype, bound
        )
        return _reduced(nll, masked, loss_weight, maskable, shift, normalizer, reduction)
    weight = _token_weight(loss_weight, masked, wide)
    if reduction == "mean" and isinstance(normalizer, str) and normalizer == "sequence":
        weight = sequence_weight(weight, masked, maskable, shift)
    stats = LossStats(
        *backend.linear_shifted_cross_entropy(
            hidden,
            lm_head_weight,
            bias,
            x0,
            masked,
            weight,
            shift,
            label_smoothing,
            cap,
            chunk_rows or 0,
            accum_dtype,
            bound,
        )
    )
    loss = stats.weighted_sum if reduction == "sum" else normalized(stats, normalizer, masked, maskable, shift)
    return loss, stats


@torch.no_grad()
def token_log_probs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    x0: Tensor,
    masked: Tensor,
    *,
    bias: Tensor | None = None,
    shift: bool = True,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of every masked token [B, L], 0 elsewhere; no gradient, no [B, L, V] logits.

    Arguments as in :func:`linear_shifted_cross_entropy`; for likelihoods and RL.
    """
    nll, _ = linear_shifted_cross_entropy(
        hidden,
        lm_head_weight,
        x0,
        masked,
        bias=bias,
        shift=shift,
        softcap=softcap,
        chunk_rows=chunk_rows,
        reduction="none",
        impl=impl,
    )
    return -nll
