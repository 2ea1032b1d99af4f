# SPDX-License-Identifier: Apache-2.0
"""Only the attention of existing code is replaced: the annealed mask is 1 bit an entry and no [B, 1, L, L] is added."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffullama_ext import AttentionMask, attention


def before(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """A dense additive mask, as the released code expands it for every layer."""
    dense = torch.where(mask.to_dense(), 0.0, torch.finfo(q.dtype).min)  # [1, L, L]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None])


def after(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """The packed mask itself."""
    out = attention(q, k, v, mask)
    assert isinstance(out, Tensor)
    return out


def main(ratio: float = 0.3) -> list[tuple[Tensor, ...]]:
    """(output, gradients of q, k and v), before and after."""
    mask, results = AttentionMask.annealed(50, ratio, seed=3, step=7), []
    for attend in (before, after):
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(2, 4, 50, 32, generator=generator, requires_grad=True) for _ in range(3))
        out = attend(q, k, v, mask)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    return results


if __name__ == "__main__":
    old, new = main()
    print((old[0] - new[0]).abs().max().item())
