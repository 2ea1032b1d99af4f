# SPDX-License-Identifier: Apache-2.0
"""What attention is measured against: the backends of torch's attention, FlexAttention, our own kernel for sm_90a.

What a peer makes of a mask or keeps for its backward is made on its first call on an input, which is not timed.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakIdKeyDictionary

from diffullama_ext import attention

Peer = Callable[..., Any]
_DENSE = WeakIdKeyDictionary()  # q -> bool [L, L]
_BLOCKS = WeakIdKeyDictionary()  # q -> BlockMask
_GRAPHS: dict[str, WeakIdKeyDictionary] = {}  # peer -> q -> out


def _dense(i: Any) -> Tensor | None:
    if i.mask is None:
        return None
    if i.q not in _DENSE:
        _DENSE[i.q] = i.mask.to_dense()[0]
    dense: Tensor = _DENSE[i.q]
    return dense


def _sdpa(i: Any, *, masked: bool, backend: SDPBackend | None = None) -> Tensor:
    mask = _dense(i) if masked else None
    grouped = i.q.shape[1] != i.k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(i.q, i.k, i.v, attn_mask=mask, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(i.q, i.k, i.v, attn_mask=mask, enable_gqa=grouped)


_compiled_flex: list[Peer] = []


def _flex(i: Any) -> Tensor:
    """The bits as a mask_mod that looks them up; its block mask leaves empty blocks out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not _compiled_flex:
        _compiled_flex.append(torch.compile(flex_attention, dynamic=False))
    dense, length = _dense(i), i.q.shape[2]
    if dense is not None and i.q not in _BLOCKS:
        _BLOCKS[i.q] = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, length, length, i.q.device)
    out: Tensor = _compiled_flex[0](i.q, i.k, i.v, block_mask=_BLOCKS.get(i.q), enable_gqa=i.q.shape[1] != i.k.shape[1])
    return out


def _hopper(i: Any) -> Tensor:
    """Ours is the portable kernel until this one has been measured."""
    os.environ["DIFFULLAMA_ATTENTION"] = "hopper"
    try:
        out: Tensor = attention(i.q, i.k, i.v, i.mask)
    finally:
        del os.environ["DIFFULLAMA_ATTENTION"]
    return out


def _forward(i: Any, *, attend: Peer) -> Tensor:
    with torch.no_grad():
        out: Tensor = attend(i)
    return out


def _backward(i: Any, *, attend: Peer, name: str) -> tuple[Tensor, ...]:
    graphs = _GRAPHS.setdefault(name, WeakIdKeyDictionary())
    if i.q not in graphs:
        graphs[i.q] = attend(i)
    return torch.autograd.grad(graphs[i.q], (i.q, i.k, i.v), i.upstream, retain_graph=True)


def attention_peers(is_backward: bool, without_mask: bool) -> dict[str, Peer]:
    """Name -> peer; "unmasked" ones leave the mask of the case out, as the bar to reach."""
    cudnn, flash, efficient = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    )
    attend: dict[str, Peer] = {
        "cuDNN, unmasked": partial(_sdpa, masked=False, backend=cudnn),
        "FlashAttention-2, unmasked": partial(_sdpa, masked=False, backend=flash),
    }
    if not without_mask:
        attend |= {
            "cuDNN, dense mask": partial(_sdpa, masked=True, backend=cudnn),
            "memory-efficient, dense mask": partial(_sdpa, masked=True, backend=efficient),
        }
    attend |= {"sdpa, dense mask": partial(_sdpa, masked=True), "FlexAttention, compiled": _flex}
    attend = {"ours, sm_90a": _hopper} | attend
    if is_backward:
        return {name: partial(_backward, attend=peer, name=name) for name, peer in attend.items()}
    return {name: partial(_forward, attend=peer) for name, peer in attend.items()}
