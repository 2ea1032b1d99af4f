# SPDX-License-Identifier: Apache-2.0
"""Stateless nn.Modules over :mod:`diffullama_ext.functional`: options fixed at construction, tensors passed."""

from torch import Tensor, nn

from . import functional
from .attention_mask import AttentionMask
from .functional import LossStats, MaskedTokens


class MaskTokens(nn.Module):
    """:func:`diffullama_ext.mask_tokens` with a fixed mask id."""

    def __init__(self, mask_id: int) -> None:
        super().__init__()
        self.mask_id = mask_id

    def forward(
        self,
        x0: Tensor,
        p_mask: Tensor,
        maskable: Tensor | None = None,
        seed: int | Tensor | None = None,
        sample_index: Tensor | None = None,
    ) -> MaskedTokens:
        """x0 [B, L], p_mask [B] or [B, L]."""
        return functional.mask_tokens(
            x0, p_mask, mask_id=self.mask_id, maskable=maskable, seed=seed, sample_index=sample_index
        )


class MaskedAttention(nn.Module):
    """:func:`diffullama_ext.attention` with fixed options."""

    def __init__(self, scale: float | None = None, *, deterministic: bool | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.deterministic = deterministic

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None = None, key_padding: Tensor | None = None
    ) -> Tensor:
        """q [B, H, Lq, D], k and v [B, Hkv, Lk, D] -> [B, H, Lq, D]."""
        out = functional.attention(
            q, k, v, mask, scale=self.scale, key_padding=key_padding, deterministic=self.deterministic
        )
        assert isinstance(out, Tensor)
        return out


class LinearShiftedCrossEntropy(nn.Module):
    """:func:`diffullama_ext.linear_shifted_cross_entropy` with fixed options; the head's weight stays the model's."""

    def __init__(
        self,
        *,
        shift: bool = True,
        normalizer: str = "tokens",
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.shift = shift
        self.normalizer = normalizer
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.chunk_rows = chunk_rows

    def forward(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        x0: Tensor,
        masked: Tensor,
        loss_weight: Tensor | None = None,
        maskable: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]:
        """hidden [B, L, H], lm_head_weight [V, H], x0 and masked [B, L] -> (loss, LossStats)."""
        return functional.linear_shifted_cross_entropy(
            hidden,
            lm_head_weight,
            x0,
            masked,
            loss_weight=loss_weight,
            bias=bias,
            maskable=maskable,
            shift=self.shift,
            normalizer=self.normalizer,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            chunk_rows=self.chunk_rows,
        )


class ShiftedCrossEntropy(nn.Module):
    """:func:`diffullama_ext.shifted_cross_entropy` with fixed options."""

    def __init__(self, *, shift: bool = True, normalizer: str = "tokens", reduction: str = "mean") -> None:
        super().__init__()
        self.shift = shift
        self.normalizer = normalizer
        self.reduction = reduction

    def forward(
        self,
        logits: Tensor,
        x0: Tensor,
        masked: Tensor,
        loss_weight: Tensor | None = None,
        maskable: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]:
        """logits [B, L, V], x0 and masked [B, L] -> (loss, LossStats)."""
        return functional.shifted_cross_entropy(
            logits,
            x0,
            masked,
            loss_weight=loss_weight,
            maskable=maskable,
            shift=self.shift,
            normalizer=self.normalizer,
            reduction=self.reduction,
        )
