# SPDX-License-Identifier: Apache-2.0
"""torch.ops.diffullama.{attention_hopper, attention_hopper_backward}: attention on sm_90a."""

from typing import Any

import torch
from torch import Tensor

from .attention_mask import fragment_mask

# Beside csrc/attention's dtypes.
WIDTHS = (64, 128)
CAPABILITY = (9, 0)
_OP = "diffullama::attention_hopper"


@torch.library.register_fake(_OP)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    fragments: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
    deterministic: bool,
    transposed_fragments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake(f"{_OP}_backward")
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor | None,
    transposed_fragments: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, words, _fragments, tile_classes, key_padding, *ctx.options, transposed_fragments = inputs
    ctx.save_for_backward(q, k, v, *output, words, transposed_fragments, tile_classes, key_padding)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    q, k, v, out, lse, words, fragments, *rest = ctx.saved_tensors
    if fragments is None and words is not None:
        fragments = fragment_mask(words, k.shape[2], True)
    grads = torch.ops.diffullama.attention_hopper_backward.default(
        dout, q, k, v, out, lse, words, fragments, *rest, *ctx.options
    )
    return (*grads, *(None,) * 8)


torch.library.register_autograd(_OP, _backward, setup_context=_save)


@torch.compiler.assume_constant_result
def runs_on(device: torch.device) -> bool:
    """Whether this build has the kernel and the device is one it is compiled for; the simulated library counts."""
    key = "CUDA" if device.type == "cuda" else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_OP, key):
        return False
    return key == "CPU" or torch.cuda.get_device_capability(device) == CAPABILITY


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Tensor | None,
    fragments: Tensor | None,
    tile_classes: Tensor | None,
    key_padding: Tensor | None,
    causal: bool,
    scale: float,
    deterministic: bool,
    transposed_fragments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Lq, D], lse [B, H, Lq]); differentiable in q, k and v through out. Scale at least 0.

    fragments: fragment_mask of the words, with them or not at all; transposed_fragments: the same of the transpose,
    which the backward makes where it is not given.
    """
    return torch.ops.diffullama.attention_hopper.default(
        q, k, v, words, fragments, tile_classes, key_padding, causal, scale, deterministic, transposed_fragments
    )
