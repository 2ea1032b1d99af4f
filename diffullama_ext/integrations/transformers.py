# SPDX-License-Identifier: Apache-2.0
"""Causal language models of transformers as masked diffusion models: configuration, tokenizer, attention; no patching.

An adapted model keeps its architecture. Its config says ``is_causal: false`` (transformers' own attention honours it),
``mask_token_id``, and ``diffusion: {shift, anneal_steps}``; so plain ``AutoModelForCausalLM`` loads what is saved and
gives the same logits. With :func:`prepare` its layers call :func:`diffullama_ext.attention`, and the forward takes
``diffusion_mask``, an AttentionMask for all layers (None: bidirectional).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import functional
from ..attention_mask import AttentionMask
from ..checks import check_int, check_range

ATTENTION_NAME = "diffullama"
NEW_MASK_TOKEN = "<|mask|>"

# What some architectures add to the softmax and diffullama_ext.attention lacks: refused rather than dropped.
_UNSUPPORTED_KWARGS = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class DiffusionConfig:
    """What an adapted model's config says about diffusion.

    Attributes:
        mask_id: id of the mask token (``config.mask_token_id``).
        shift: logits row i predicts token i+1, as in the autoregressive model.
        anneal_steps: optimiser steps from causal to bidirectional attention in training; 0 is bidirectional at once.
    """

    mask_id: int
    shift: bool = True
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        check_int("mask_id", self.mask_id, 0, 2**31 - 1)
        check_int("anneal_steps", self.anneal_steps, 0, 2**31 - 1)

    @classmethod
    def of(cls, model: PreTrainedModel) -> DiffusionConfig:
        """Read it from ``model.config``; ValueError where the model is not adapted."""
        config = model.config
        diffusion = getattr(config, "diffusion", None)
        mask_id = getattr(config, "mask_token_id", None)
        if not is_adapted(model):
            name = getattr(config, "_name_or_path", "") or type(model).__name__
            raise ValueError(
                f"{name} is not adapted to diffusion: its config must have is_causal=False, mask_token_id and "
                f"diffusion, got is_causal={getattr(config, 'is_causal', None)}, mask_token_id={mask_id}, "
                f"diffusion={diffusion}; call diffullama_ext.integrations.adapt first"
            )
        return cls(mask_id=config.mask_token_id, **config.diffusion)

    def write(self, model: PreTrainedModel) -> None:
        """Put it, and ``is_causal=False``, into ``model.config``."""
        model.config.is_causal = False
        model.config.mask_token_id = self.mask_id
        model.config.diffusion = {"shift": self.shift, "anneal_steps": self.anneal_steps}


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether ``model.config`` says that the model is a diffusion model, as :func:`adapt` writes it."""
    known = (getattr(model.config, name, None) is not None for name in ("mask_token_id", "diffusion"))
    return not getattr(model.config, "is_causal", True) and all(known)


# --- attention --------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    diffusion_mask: AttentionMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' AttentionInterface, over :func:`diffullama_ext.attention`.

    Gradients repeat bit for bit on CUDA under ``torch.use_deterministic_algorithms(True)``.

    Args:
        module: the calling attention layer.
        query: [B, H, Lq, D]; key, value: [B, Hkv, Lk, D] with their own number of heads.
        attention_mask: [B, Lk] bool, True for real keys, as :func:`padding_mask` returns it, or None.
        is_causal: of the config of an adapted model False; a model that is not adapted stays causal.
        diffusion_mask: for (Lq, Lk), the same for every layer; None goes by is_causal.

    Returns:
        ([B, Lq, H, D] contiguous, None).

    Raises:
        ValueError: attention dropout, a sliding window, a softcap, sinks, a bias or a 4-D mask was asked for; the model
            drops the keyword arguments of its forward.
    """
    if dropout > 0:
        raise ValueError(
            f"attention dropout must be 0 with {ATTENTION_NAME!r} attention, got {dropout}; adapt() sets it"
        )
    n_keys = key.shape[2]
    if sliding_window is not None and n_keys > sliding_window:
        raise ValueError(f"{ATTENTION_NAME!r} attention has no window, got one of {sliding_window} for {n_keys} keys")
    for name in _UNSUPPORTED_KWARGS:
        if kwargs.get(name) is not None:
            raise ValueError(f"{ATTENTION_NAME!r} attention has no {name}; {type(module).__name__} needs it")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be padding [B, L], got {list(attention_mask.shape)}; give any other mask as "
            "diffusion_mask=AttentionMask.from_dense(...)"
        )
    if diffusion_mask is None:
        if is_causal is None:  # transformers passes config.is_causal, where the model hands on keyword arguments
            if getattr(getattr(module, "config", None), "is_causal", True) is False:
                raise ValueError(
                    f"{type(module).__name__} gets no keyword arguments of the model's forward, so neither "
                    "diffusion_mask nor config.is_causal; this architecture cannot be adapted"
                )
            is_causal = getattr(module, "is_causal", True)
        if is_causal and query.shape[2] > 1:  # one query, the last, may see every key
            diffusion_mask = AttentionMask.causal(query.shape[2], device=query.device)
    out = functional.attention(query, key, value, diffusion_mask, scale=scaling, key_padding=attention_mask)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function of transformers' AttentionMaskInterface: the padding [B, Lk] as it is, or None.

    Without it transformers would drop the padding. The pattern (``mask_function``: causal, bidirectional) is not used:
    it is :func:`attention_forward` that knows it. Nothing reads the mask's values here, which would stall a GPU.
    """
    return attention_mask


def register_attention() -> None:
    """Make "diffullama" a name for ``attn_implementation`` in transformers. Idempotent; importing does not do it."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)


# --- adapting ---------------------------------------------------------------------------------------------------------


def _check_causal_lm(model: object) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; adapt before wrapping it"
        )
    if model.config.is_encoder_decoder or not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(f"model must be a causal language model (AutoModelForCausalLM), got {type(model).__name__}")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"model must be text only, got {type(model).__name__}, which holds its language model inside")
    layer_types = getattr(model.config, "layer_types", None) or []
    other = sorted(set(layer_types) - {"full_attention"})
    if other:
        raise ValueError(
            f"every layer must have full attention, got {', '.join(other)} in layer_types of {type(model).__name__}"
        )
    return model


def _use_attention(model: PreTrainedModel) -> None:
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(f"{type(model).__name__} does not take its attention from transformers' AttentionInterface")


def _without_window(model: PreTrainedModel) -> None:
    window = getattr(model.config, "sliding_window", None)
    if window is not None and not getattr(model.config, "layer_types", None):  # by type, no layer has it
        model.config.sliding_window = None
        warnings.warn(
            f"sliding_window={window} becomes None: a diffusion model attends to the whole sequence", stacklevel=3
        )


def _without_attention_dropout(model: PreTrainedModel) -> None:
    """In the config and in the layers already built from it."""
    for name in ("attn_pdrop", "attention_dropout"):
        if getattr(model.config, name, None):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        for name in ("attn_dropout", "attention_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout):
                value.p = 0.0
            elif isinstance(value, float):
                setattr(module, name, 0.0)


def _n_embeddings(model: PreTrainedModel) -> int:
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


@torch.no_grad()
def _add_embedding(model: PreTrainedModel, token_id: int, n_known: int) -> None:
    """Row ``token_id`` of input and output embeddings, made where there is none, becomes the mean of the first n_known.

    The mean has the scale of a token and favours none; it needs no random draw.
    """
    n_known = min(n_known, _n_embeddings(model))
    if token_id >= _n_embeddings(model):  # many vocabularies are padded: the row exists already
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = cast(Tensor, embeddings.weight)
        weight[token_id] = weight[:n_known].mean(dim=0)


def _check_mask_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, mask_token: str | int | None
) -> None:
    if isinstance(mask_token, int) and not isinstance(mask_token, bool):
        check_range("mask_token", mask_token, 0, _n_embeddings(model) - 1)
    elif mask_token is not None and not isinstance(mask_token, str):
        raise TypeError(f"mask_token must be None, a token or an id, got {mask_token!r}")
    elif tokenizer is None:
        raise ValueError(f"tokenizer must be given for mask_token={mask_token!r}; only an existing id needs none")


def _mask_id(model: PreTrainedModel, tokenizer: Any, mask_token: str | int | None) -> int:
    """The id of ``mask_token``; adds it to the tokenizer and the embeddings where it is new."""
    if isinstance(mask_token, int):
        return mask_token
    n_known = len(tokenizer)
    if mask_token is not None or tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": mask_token or NEW_MASK_TOKEN})
    mask_id = tokenizer.mask_token_id
    if mask_id >= min(n_known, _n_embeddings(model)):
        _add_embedding(model, mask_id, n_known)
    return mask_id


def adapt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    mask_token: str | int | None = None,
    shift: bool = True,
    anneal_steps: int = 0,
) -> PreTrainedModel:
    """Turn a causal language model into a masked diffusion model, in place: no weight changes but a new token's row.

    Changes to the config: ``is_causal`` False, ``mask_token_id`` and ``diffusion``; ``use_cache`` False, because with
    bidirectional attention the keys and values of a token depend on the tokens after it; attention dropout 0 (GPT-2
    has 0.1), which :func:`diffullama_ext.attention` lacks; ``sliding_window`` None, with a warning. Residual and
    embedding dropout stay.

    Args:
        model: an ``AutoModelForCausalLM`` whose layers take their attention from transformers' AttentionInterface and
            all have full attention (GPT-2, LLaMA, Qwen2, Qwen3, Mistral, ...), not yet wrapped.
        tokenizer: changed in place where the mask token is new or was not its ``mask_token``.
        mask_token: None takes the tokenizer's, or adds "<|mask|>" where it has none; a text, new or not, becomes the
            tokenizer's mask token; an int is an existing id (the paper reuses rare tokens) and leaves the tokenizer as
            it is. A new token's embedding is the mean of all others.
        shift: logits row i predicts token i+1, as the model was trained to do.
        anneal_steps: optimiser steps from causal to bidirectional attention in training.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: not a causal language model of transformers, layers with other than full attention, no
            tokenizer for a textual mask token, an id outside the embeddings, anneal_steps < 0.
    """
    _check_causal_lm(model)
    check_int("anneal_steps", anneal_steps, 0, 2**31 - 1)
    _check_mask_token(model, tokenizer, mask_token)
    _use_attention(model)
    mask_id = _mask_id(model, tokenizer, mask_token)
    DiffusionConfig(mask_id, bool(shift), anneal_steps).write(model)
    model.config.use_cache = False
    if model.generation_config is not None:
        model.generation_config.use_cache = False
    _without_window(model)
    _without_attention_dropout(model)
    return model


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Give an adapted model that transformers loaded the attention of this package; ValueError where it is not one."""
    mask_id = DiffusionConfig.of(_check_causal_lm(model)).mask_id
    if mask_id >= _n_embeddings(model):
        raise ValueError(f"mask_token_id must be in the vocabulary of {_n_embeddings(model)} tokens, got {mask_id}")
    _use_attention(model)
    return model
