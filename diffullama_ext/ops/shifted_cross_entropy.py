# SPDX-License-Identifier: Apache-2.0
"""torch.ops.diffullama.{shifted_cross_entropy, linear_shifted_nll, linear_shifted_cross_entropy}, with backwards."""

from typing import Any

import torch
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Losses are float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# --- from logits -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("diffullama::shifted_cross_entropy")
def _(
    logits: Tensor, x0: Tensor, masked: Tensor, shift: bool, label_smoothing: float, softcap: float
) -> tuple[Tensor, Tensor]:
    nll = x0.new_empty(x0.shape, dtype=_wide(logits.dtype))
    return nll, torch.empty_like(nll)


@torch.library.register_fake("diffullama::shifted_cross_entropy_backward")
def _(
    dnll: Tensor,
    logits: Tensor,
    lse: Tensor,
    x0: Tensor,
    masked: Tensor,
    shift: bool,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, x0, masked, *ctx.options = inputs
    ctx.save_for_backward(logits, output[1], x0, masked)
    ctx.set_materialize_grads(False)


def _backward_logits(ctx: Any, dnll: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dnll is None:
        return (None,) * 6
    logits, lse, x0, masked = ctx.saved_tensors
    dlogits = torch.ops.diffullama.shifted_cross_entropy_backward.default(dnll, logits, lse, x0, masked, *ctx.options)
    return (dlogits, *(None,) * 5)


torch.library.register_autograd("diffullama::shifted_cross_entropy", _backward_logits, setup_context=_save_logits)


def shifted_cross_entropy(
    logits: Tensor, x0: Tensor, masked: Tensor, shift: bool, label_smoothing: float, softcap: float
) -> Tensor:
    """nll [B, L]; differentiable in logits."""
    return torch.ops.diffullama.shifted_cross_entropy.default(logits, x0, masked, shift, label_smoothing, softcap)[0]


# --- from hidden states, one value a token ---------------------------------------------------------------------------


@torch.library.register_fake("diffullama::linear_shifted_nll")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    masked: Tensor,
    shift: bool,
    label_smoothing: float,
    softcap: float,
    chunk_rows: int,
    accum_dtype: torch.dtype,
    max_scored: int,
) -> Tensor:
    return x0.new_empty(x0.shape, dtype=_wide(hidden.dtype))


def _fake_grads(
    hidden: Tensor, weight: Tensor, accum_dtype: torch.dtype, need_dhidden: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,), dtype=accum_dtype),
        hidden.new_empty((weight.shape[0] if need_dbias else 0,), dtype=accum_dtype),
    )


@torch.library.register_fake("diffullama::linear_shifted_nll_backward")
def _(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    masked: Tensor,
    shift: bool,
    label_smoothing: float,
    softcap: float,
    chunk_rows: int,
    accum_dtype: torch.dtype,
    max_scored: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_grads(hidden, weight, accum_dtype, need_dhidden, need_dweight, need_dbias)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, x0, masked, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, x0, masked)


def _cast(grad: Tensor, like: Tensor | None, needed: bool) -> Tensor | None:
    return grad.to(like.dtype) if needed and like is not None else None


def _backward_linear(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, x0, masked = ctx.saved_tensors
    grads = list(ctx.needs_input_grad[:3])
    dhidden, dweight, dbias = torch.ops.diffullama.linear_shifted_nll_backward.default(
        dnll, hidden, weight, bias, x0, masked, *ctx.options, *grads
    )
    inputs = ((dhidden, hidden), (dweight, weight), (dbias, bias))
    return (*(_cast(d, x, needed) for (d, x), needed in zip(inputs, grads, strict=True)), *(None,) * 8)


torch.library.register_autograd("diffullama::linear_shifted_nll", _backward_linear, setup_context=_save_linear)


def linear_shifted_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    masked: Tensor,
    shift: bool,
    label_smoothing: float,
    softcap: float,
    chunk_rows: int,
    accum_dtype: torch.dtype,
    max_scored: int,
) -> Tensor:
    """nll [B, L]; differentiable in hidden, weight and bias (the backward computes the logits again)."""
    return torch.ops.diffullama.linear_shifted_nll.default(
        hidden, weight, bias, x0, masked, shift, label_smoothing, softcap, chunk_rows, accum_dtype, max_scored
    )


# --- from hidden states, the weighted sum: gradients are made in the forward, while a chunk of logits is alive --------


@torch.library.register_fake("diffullama::linear_shifted_cross_entropy")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    masked: Tensor,
    loss_weight: Tensor,
    shift: bool,
    label_smoothing: float,
    softcap: float,
    chunk_rows: int,
    accum_dtype: torch.dtype,
    max_scored: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weighted_sum = hidden.new_empty((), dtype=_wide(hidden.dtype))
    return (
        weighted_sum,
        torch.empty_like(weighted_sum),
        x0.new_empty(()),
        *_fake_grads(hidden, weight, accum_dtype, need_dhidden, need_dweight, need_dbias),
    )


def _save_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *_ = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_fused(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 15
    triples = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    return (
        *((grad * dloss.to(grad.dtype)).to(dtype) if needed else None for grad, dtype, needed in triples),
        *(None,) * 12,
    )


torch.library.register_autograd("diffullama::linear_shifted_cross_entropy", _backward_fused, setup_context=_save_fused)


def linear_shifted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    masked: Tensor,
    loss_weight: Tensor,
    shift: bool,
    label_smoothing: float,
    softcap: float,
    chunk_rows: int,
    accum_dtype: torch.dtype,
    max_scored: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of loss_weight * nll, sum of nll, number scored), scalars; the first is differentiable."""
    inputs = (hidden, weight, bias)
    grads = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    weighted_sum, nll_sum, count, *_ = torch.ops.diffullama.linear_shifted_cross_entropy.default(
        *inputs, x0, masked, loss_weight, shift, label_smoothing, softcap, chunk_rows, accum_dtype, max_scored, *grads
    )
    return weighted_sum, nll_sum, count
