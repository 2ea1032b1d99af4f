# SPDX-License-Identifier: Apache-2.0
"""Loading the model that the user named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import pick_device, quiet_libraries
from .errors import checking_input


def model_path(name: str) -> str:
    """A folder that holds ``model/`` (a demo run) stands for it; anything else for itself."""
    inner = Path(name).expanduser() / "model"
    if (inner / "config.json").exists() and not (inner.parent / "config.json").exists():
        return str(inner)
    return name


def load_to_train(name: str) -> tuple[Any, Any]:
    """(model in float32, tokenizer): one to adapt, or an adapted one, prepared, in any layout that `load` knows.

    ValueError where its attention sees later tokens and it is not adapted: transformers loads BERT and its like as
    causal language models too, as they are.
    """
    import torch

    from ..integrations import is_adapted, load, load_causal_lm, names_diffusion_model, prepare

    path = model_path(name)
    if names_diffusion_model(path):
        return load(path, dtype=torch.float32)
    model, tokenizer = load_causal_lm(path, dtype=torch.float32)  # bfloat16 weights lose small steps
    if is_adapted(model):
        return prepare(model), tokenizer
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if causal and not any(causal):
        raise ValueError(f"{name!r} is not a causal language model: its attention sees later tokens")
    return model, tokenizer


def load_adapted(name: str, device: str) -> tuple[Any, Any]:
    """(model on the device, tokenizer) of an adapted model; BadInput in one line otherwise."""
    quiet_libraries()
    from ..integrations import load

    with checking_input():
        where = pick_device(device)
        model: Any
        model, tokenizer = load(model_path(name))
    return model.to(where).eval(), tokenizer
