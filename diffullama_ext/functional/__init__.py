# SPDX-License-Identifier: Apache-2.0
"""The public functions. Each checks its arguments, then runs the compiled kernel or, with ``impl="reference"`` or
without one, the plain PyTorch of :mod:`diffullama_ext.reference`.

Shapes: B batch, L length, V vocabulary, H hidden size or heads, D head size, N rows.
"""

from .attention import annealed_attention, attention
from .noising import MaskedTokens, mask_tokens
from .shifted_cross_entropy import LossStats, linear_shifted_cross_entropy, shifted_cross_entropy, token_log_probs
from .unmasking import TokenStats, Unmasked, token_stats, unmask

__all__ = [
    "LossStats",
    "MaskedTokens",
    "TokenStats",
    "Unmasked",
    "annealed_attention",
    "attention",
    "linear_shifted_cross_entropy",
    "mask_tokens",
    "shifted_cross_entropy",
    "token_log_probs",
    "token_stats",
    "unmask",
]
