# SPDX-License-Identifier: Apache-2.0
"""Where the package meets other libraries."""

from .transformers import DiffusionConfig, adapt, load, load_causal_lm, prepare, register_attention

__all__ = ["DiffusionConfig", "adapt", "load", "load_causal_lm", "prepare", "register_attention"]
