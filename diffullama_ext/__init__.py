# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion language models from autoregressive ones: each step of training and sampling as one fused op."""

from . import functional, modules, reference, schedules
from ._library import build_info
from ._version import __version__
from .attention_mask import AttentionMask
from .functional import (
    LossStats,
    MaskedTokens,
    TokenStats,
    Unmasked,
    annealed_attention,
    attention,
    linear_shifted_cross_entropy,
    mask_tokens,
    shifted_cross_entropy,
    token_log_probs,
    token_stats,
    unmask,
)
from .kernel_plan import KernelPlan, kernel_plan

__all__ = [
    "AttentionMask",
    "KernelPlan",
    "LossStats",
    "MaskedTokens",
    "TokenStats",
    "Unmasked",
    "__version__",
    "annealed_attention",
    "attention",
    "build_info",
    "functional",
    "kernel_plan",
    "linear_shifted_cross_entropy",
    "mask_tokens",
    "modules",
    "reference",
    "schedules",
    "shifted_cross_entropy",
    "token_log_probs",
    "token_stats",
    "unmask",
]
