# SPDX-License-Identifier: Apache-2.0
"""Where the package meets other libraries."""

from .loading import load, load_causal_lm, names_diffusion_model
from .lora import add_lora
from .published import CONVENTIONS, Convention, save_wrapped
from .transformers import DiffusionConfig, adapt, is_adapted, prepare, register_attention

__all__ = [
    "CONVENTIONS",
    "Convention",
    "DiffusionConfig",
    "adapt",
    "add_lora",
    "is_adapted",
    "load",
    "load_causal_lm",
    "names_diffusion_model",
    "prepare",
    "register_attention",
    "save_wrapped",
]
