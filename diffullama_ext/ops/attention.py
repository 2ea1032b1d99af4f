# SPDX-License-Identifier: Apache-2.0
"""torch.ops.diffullama.attention. On the CPU it runs torch's own flash attention under the unpacked mask."""

import os
from typing import Any

import torch
from torch import Tensor

from . import attention_hopper

# What csrc/attention takes; the rest goes through the reference.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_WIDTHS = (32, 64, 96, 128, 256)
CLASS_TILE = 64  # queries and keys of an entry of tile_classes
_FORCE = "DIFFULLAMA_ATTENTION"
# The simulated library (csrc/testing) has the CUDA kernel for CPU tensors.
_SIMULATED = torch._C._dispatch_has_kernel_for_dispatch_key("diffullama::attention", "CPU")

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _by_length(x: Tensor) -> Tensor:
    """x [B, H, L, D] in memory as [B, L, H, D]: torch's kernel writes so on the CPU, and models read it so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(like: Tensor) -> Tensor:
    """What the op makes in the shape of ``like``: [B, H, L, D]."""
    made = like.new_empty(like.shape)
    return made if like.device.type != "cpu" or _SIMULATED else _by_length(made)


@torch.library.register_fake("diffullama::attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("diffullama::attention_backward")
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


# --- CPU -------------------------------------------------------------------------------------------------------------


def _dense_mask(
    q: Tensor, k: Tensor, words: Tensor | None, key_padding: Tensor | None, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(additive mask broadcastable to [B, 1, Lq, Lk], rows [.., Lq, 1] that may attend to nothing), None for neither.

    Such rows are opened to every key, so that torch's softmax stays finite; the caller writes their zeros.
    """
    q_length, k_length = q.shape[2], k.shape[2]
    allowed = None
    if words is not None:
        allowed = torch.ops.diffullama.unpack_mask.default(words, k_length)[:, None]
    elif causal:
        allowed = torch.ones(q_length, k_length, dtype=torch.bool, device=q.device).tril()[None, None]
    if key_padding is not None:
        allowed = key_padding[:, None, None, :] if allowed is None else allowed & key_padding[:, None, None, :]
        allowed = allowed.expand(-1, -1, q_length, -1)
    if allowed is None:
        return None, None
    bias = q.new_zeros(allowed.shape)
    empty = ~allowed.any(dim=-1, keepdim=True)
    if not empty.any():
        return bias.masked_fill_(~allowed, -torch.inf), None
    return bias.masked_fill_(~(allowed | empty), -torch.inf), empty


def _last_dim_dense(x: Tensor) -> Tensor:
    """torch's kernel takes any strides but assumes the last one is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _group_heads(x: Tensor, group: int) -> Tensor:
    return _last_dim_dense(x if group == 1 else x.repeat_interleave(group, dim=1))


def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return _empty(q).zero_(), lse
    bias, empty = _dense_mask(q, k, words, key_padding, causal)
    group = q.shape[1] // k.shape[1]
    out, lse = _flash(
        _last_dim_dense(q), _group_heads(k, group), _group_heads(v, group), 0.0, False, attn_mask=bias, scale=scale
    )
    if empty is not None:
        out, lse = out.masked_fill_(empty, 0.0), lse.masked_fill_(empty.squeeze(-1), -torch.inf)
    return _by_length(out), lse.contiguous()


def _attention_backward_cpu(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return _empty(q).zero_(), _empty(k).zero_(), _empty(v).zero_()
    bias, empty = _dense_mask(q, k, words, key_padding, causal)
    if empty is not None:  # any finite lse will do where dout is 0: the row's gradient is P * 0
        dout = dout.masked_fill(empty, 0.0)
        lse = lse.masked_fill(empty.squeeze(-1), torch.finfo(lse.dtype).max)
    group = q.shape[1] // k.shape[1]
    wide = (_group_heads(k, group), _group_heads(v, group))
    dq, dk, dv = _flash_backward(
        _last_dim_dense(dout), _last_dim_dense(q), *wide, out, lse, 0.0, False, attn_mask=bias, scale=scale
    )
    if group > 1:
        dk, dv = (x.unflatten(1, (-1, group)).sum(dim=2) for x in (dk, dv))
    return _by_length(dq), _by_length(dk), _by_length(dv)


if not _SIMULATED:
    torch.library.impl("diffullama::attention", "CPU")(_attention_cpu)
    torch.library.impl("diffullama::attention_backward", "CPU")(_attention_backward_cpu)


# --- autograd --------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, words, tile_classes, key_padding, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, words, tile_classes, key_padding)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    grads = torch.ops.diffullama.attention_backward.default(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return (*grads, None, None, None, None, None)


torch.library.register_autograd("diffullama::attention", _backward, setup_context=_save)


# --- choice of a path ------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _forced() -> str:
    """The path that the environment asks for, read when a graph is compiled; "" for none."""
    return os.environ.get(_FORCE, "")


def path(q: Tensor) -> str:
    """Which implementation takes q: "portable" or "hopper" (csrc/attention), "torch" (on the CPU) or "reference".

    ``DIFFULLAMA_ATTENTION`` = portable, hopper or reference forces one; "hopper" is never chosen otherwise. ValueError
    for another name, or for a q that the forced path does not take; RuntimeError for a path that this build lacks on
    q's device.
    """
    has_kernel = q.device.type == "cuda" or _SIMULATED
    fits = q.dtype in KERNEL_DTYPES and q.shape[3] in KERNEL_WIDTHS
    forced = _forced()
    if not forced:
        return ("portable" if fits else "reference") if has_kernel else "torch"
    if forced == "reference":
        return forced
    if forced not in ("portable", "hopper"):
        raise ValueError(f"{_FORCE} must be portable, hopper or reference, got {forced!r}")
    if not (attention_hopper.runs_on(q.device) if forced == "hopper" else has_kernel):
        raise RuntimeError(f"{_FORCE}={forced}: this build has no such path on {q.device.type}")
    widths = attention_hopper.WIDTHS if forced == "hopper" else KERNEL_WIDTHS
    if q.dtype not in KERNEL_DTYPES or q.shape[3] not in widths:
        taken = ", ".join(map(str, widths))
        raise ValueError(
            f"{_FORCE}={forced} takes float16 and bfloat16 of a head size in {taken}, got {q.dtype} of {q.shape[3]}"
        )
    return forced


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
    fragments: Tensor | None = None,
    *,
    hopper: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Lq, D], lse [B, H, Lq]); differentiable in q, k and v through out.

    tile_classes: of the words in tiles of CLASS_TILE x CLASS_TILE, which only csrc/attention reads; fragments: of the
    words, for "hopper" only.
    """
    if scale < 0:
        q, scale = -q, -scale  # the kernels take the maximum of unscaled scores
    if hopper:
        return attention_hopper.attention(q, k, v, words, fragments, tile_classes, key_padding, causal, scale)
    return torch.ops.diffullama.attention.default(q, k, v, words, tile_classes, key_padding, causal, scale)
