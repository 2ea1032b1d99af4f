# SPDX-License-Identifier: Apache-2.0
"""Models from folders and the Hub, in every layout that diffusion models are published in; never a part of one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checks import check_choice
from .published import CONVENTIONS, PUBLISHED, WRAPPED_EMBEDDING, family_of, is_wrapped, tensor_shapes, unwrapping
from .transformers import adapt, prepare

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHOWN = 4  # names in an error message


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)})" if len(names) > _SHOWN else "")


def _check_complete(name: str, found: dict[str, Iterable[Any]]) -> None:
    """ValueError where weights are missing, unexpected or of another shape: the model would be another one."""
    wrong = [
        f"{what.removesuffix('_keys')} weights: {_some(keys)}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (keys := [" ".join(map(str, key)) if isinstance(key, tuple) else key for key in found.get(what) or ()])
    ]
    if wrong:
        raise ValueError(f"the weights at {name!r} are not those of its config; {'; '.join(wrong)}")


# --- models -----------------------------------------------------------------------------------------------------------


def _unwrapped(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What from_pretrained needs to read a wrapper's checkpoint in the folder ``name``; empty where it is none."""
    shapes = tensor_shapes(Path(name))
    if not is_wrapped(shapes):
        return {}
    config: PreTrainedConfig = kwargs.get("config") or AutoConfig.from_pretrained(name)
    rows = shapes[f"{WRAPPED_EMBEDDING}.weight"][0] if f"{WRAPPED_EMBEDDING}.weight" in shapes else config.vocab_size
    config.vocab_size = rows  # DiffuGPT-M has a row more than the config that it was saved with
    with torch.device("meta"):
        return {"config": config, "key_mapping": unwrapping(AutoModelForCausalLM.from_config(config))}


def _snapshot(name: str) -> str:
    """A folder with the files of a model: ``name`` itself, or the Hub's copy of a published one."""
    if Path(name).is_dir() or family_of(name) not in PUBLISHED:
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])


def _load_model(name: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    kwargs = {"ignore_mismatched_sizes": True} | kwargs  # _check_complete names them
    try:
        folder = _snapshot(name)
        if Path(folder).is_dir() and "gguf_file" not in kwargs:
            kwargs = kwargs | _unwrapped(folder, kwargs)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"no model at {name!r}: {_first_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{name!r} is not a causal language model: {_first_line(error)}") from error
    model, found = loaded
    _check_complete(name, found)
    return model


def load_causal_lm(path_or_id: str | Path, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal language model and its tokenizer, with errors of one line.

    Args:
        path_or_id: a directory or an id of the Hugging Face Hub: of transformers, or a DiffuGPT checkpoint in the
            layout of its wrapper.
        kwargs: of ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, gguf_file, quantization_config, ...).

    Raises:
        FileNotFoundError: no model or no tokenizer is there. ValueError: it is not a causal language model, or its
            weights are not those that its config asks for.
    """
    name = str(path_or_id)
    if Path(name).is_file():
        raise FileNotFoundError(f"{name!r} is a file; give the folder of the model")
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.count("/") > 1 or name.startswith(".")):
        raise FileNotFoundError(f"no such directory: {name!r}")
    model = _load_model(name, kwargs)
    try:
        gguf = {"gguf_file": kwargs["gguf_file"]} if "gguf_file" in kwargs else {}
        tokenizer = AutoTokenizer.from_pretrained(name, **gguf)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no tokenizer at {name!r}: {_first_line(error)}") from error
    # Where there are no files of one, transformers 5 makes some families' tokenizer of special tokens alone.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise FileNotFoundError(f"no tokenizer at {name!r}: it has no vocabulary; save the tokenizer beside the model")
    return model, tokenizer


# --- adapters ---------------------------------------------------------------------------------------------------------


def _is_adapter(name: str) -> bool:
    folder = Path(name)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def names_diffusion_model(path_or_id: str | Path) -> bool:
    """Whether the name alone says so: a published model, or a folder that holds only an adapter."""
    return family_of(path_or_id) in PUBLISHED or _is_adapter(str(path_or_id))


def _with_adapter(model: PreTrainedModel, name: str, merge: bool) -> Any:
    """``model`` with the LoRA weights in the folder ``name``, merged or as a trainable PeftModel."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    path = Path(name) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {name!r}: it has no {ADAPTER_WEIGHTS}")
    try:
        given = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is torn or no safetensors file: {error}") from error
    for pattern, replacement in unwrapping(model, before="base_model.model.").items():
        given = {re.sub(pattern, replacement, key): value for key, value in given.items()}
    config = PeftConfig.from_pretrained(name)
    config.inference_mode = merge  # peft saves True, and its weights would not train
    wrapped: Any = get_peft_model(model, config)
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    _check_complete(
        name, {"missing_keys": wanted.keys() - given.keys(), "unexpected_keys": given.keys() - wanted.keys()}
    )
    set_peft_model_state_dict(wrapped, given)
    return wrapped.merge_and_unload() if merge else wrapped


def load(
    path_or_id: str | Path,
    *,
    convention: str | None = None,
    base: str | Path | None = None,
    merge: bool = True,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A diffusion model and its tokenizer, ready for the ops of this package.

    Args:
        path_or_id: a directory or an id of the Hub: a model saved after :func:`adapt`, a published one
            ("diffusionfamily/diffugpt-s", "-m", "diffullama"), or a directory with a LoRA adapter of either.
        convention: a name of CONVENTIONS, for a model whose config does not say that it is adapted; None takes the last
            part of ``path_or_id`` where that is one.
        base: of an adapter; None takes what the adapter names.
        merge: an adapter's weights go into the model's; False gives a ``PeftModel`` to train on.
        kwargs: of ``AutoModelForCausalLM.from_pretrained`` (dtype, device_map, ...).

    Raises:
        FileNotFoundError: nothing is there. ValueError: it is not a causal language model, it is not adapted and
            follows no convention, weights are missing or unexpected, or the mask id is outside the vocabulary.
    """
    if convention is not None:
        check_choice("convention", convention, tuple(CONVENTIONS))
    name = _snapshot(str(path_or_id))
    if not _is_adapter(name):
        model, tokenizer = load_causal_lm(name, **kwargs)
        return _prepared(model, convention or family_of(path_or_id)), tokenizer
    from peft import PeftConfig

    base = base or PeftConfig.from_pretrained(name).base_model_name_or_path
    if base is None:
        raise ValueError(f"base must be given: the adapter at {name!r} names no model")
    model, tokenizer = load_causal_lm(base, **kwargs)
    _prepared(model, convention or family_of(base))
    return _with_adapter(model, name, merge), tokenizer


def _prepared(model: PreTrainedModel, convention: str) -> PreTrainedModel:
    """With its own diffusion config, else that of the convention; ValueError where there is neither."""
    if getattr(model.config, "diffusion", None) is None and convention in CONVENTIONS:
        known = CONVENTIONS[convention]
        return adapt(model, mask_token=known.mask_id, shift=known.shift)
    return prepare(model)
