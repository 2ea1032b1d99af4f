# SPDX-License-Identifier: Apache-2.0
"""How published diffusion models are stored: what their configs leave unsaid, and the names of their weights.

The DiffuGPT checkpoints hold a wrapper's state dict: the decoder under ``denoise_model``, and beside it
``embed_tokens`` and ``lm_head``. DiffuLLaMA's hold plain LLaMA names. Adapters trained on either hold peft's names over
those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WRAPPED_DECODER, WRAPPED_EMBEDDING = "denoise_model", "embed_tokens"
WRAPPER = "DiscreteDiffusionModel"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Convention:
    """What the code of a family of diffusion models takes for granted.

    Attributes:
        mask_id: id of its mask token.
        shift: logits row i predicts token i+1.
    """

    mask_id: int
    shift: bool


CONVENTIONS = {
    "diffugpt-s": Convention(mask_id=10541, shift=True),  # an existing rare token
    "diffugpt-m": Convention(mask_id=50257, shift=True),  # a new token behind GPT-2's
    "diffullama": Convention(mask_id=811, shift=True),  # an existing rare token
    "llada": Convention(mask_id=126336, shift=False),
    "dream": Convention(mask_id=151666, shift=True),
}
PUBLISHED = (*CONVENTIONS, "diffullama-gsm")  # the last one is an adapter


def family_of(name: str | Path) -> str:
    """The last part of a path or id, as CONVENTIONS spells it ("diffusionfamily/diffugpt-s" is a diffugpt-s)."""
    return Path(name).name.lower()


# --- names ------------------------------------------------------------------------------------------------------------


def _embedding_name(model: PreTrainedModel) -> str:
    """Of the token embedding inside the causal language model: "transformer.wte", "model.embed_tokens"."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def unwrapping(model: PreTrainedModel, before: str = "") -> dict[str, str]:
    """Patterns of the wrapper's names behind ``before``, and what ``model`` calls them (transformers' key_mapping)."""
    return {
        rf"^{re.escape(before)}{WRAPPED_EMBEDDING}\.": f"{before}{_embedding_name(model)}.",
        rf"^{re.escape(before)}{WRAPPED_DECODER}\.": f"{before}{model.base_model_prefix}.",
    }


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the safetensors files of a folder; empty where there are none, ValueError for torn ones."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is torn or no safetensors file: {error}") from error
    return shapes


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether these are names of the wrapper's state dict."""
    return any(name.startswith(f"{WRAPPED_DECODER}.") for name in names)


# --- saving -----------------------------------------------------------------------------------------------------------


def save_wrapped(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Save a model as the DiffuGPT checkpoints are, for code that reads those; ``load`` reads it too.

    Args:
        model: a causal language model, adapted or not. A tied head is stored once, as ``embed_tokens``.
        folder: made where it is missing.
        tokenizer: saved beside it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    decoder, embedding = f"{model.base_model_prefix}.", f"{_embedding_name(model)}."
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(embedding):
            name = f"{WRAPPED_EMBEDDING}.{name.removeprefix(embedding)}"
        elif name.startswith(decoder):
            name = f"{WRAPPED_DECODER}.{name.removeprefix(decoder)}"
        elif tied and name == "lm_head.weight":
            continue
        tensors[name] = tensor.contiguous()
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"architectures": [WRAPPER]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shared = {"lm_head.weight": f"{WRAPPED_EMBEDDING}.weight"} if tied else {}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"} | shared)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
