# SPDX-License-Identifier: Apache-2.0
"""torch.ops.diffullama.mask_tokens."""

import torch
from torch import Tensor


@torch.library.register_fake("diffullama::mask_tokens")
def _(
    x0: Tensor, p_mask: Tensor, maskable: Tensor | None, seed: Tensor, sample_index: Tensor, mask_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = x0.shape
    return (
        x0.new_empty((batch, length)),
        x0.new_empty((batch, length), dtype=torch.bool),
        x0.new_empty((batch * length,)),
        x0.new_empty((batch,)),
    )


def mask_tokens(
    x0: Tensor, p_mask: Tensor, maskable: Tensor | None, seed: Tensor, sample_index: Tensor, mask_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(xt [B, L], masked [B, L], positions [B*L], counts [B]); arguments as in the schema."""
    return torch.ops.diffullama.mask_tokens.default(x0, p_mask, maskable, seed, sample_index, mask_id)
