# SPDX-License-Identifier: Apache-2.0
"""Random causal language models of every family, small enough for a test, and a tokenizer for them."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
MASK_ID = 7
WORDS = ["<unk>", "<pad>", *(f"w{i}" for i in range(VOCAB - 2))]

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from uniform outputs, so that a wrong mask shows
}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda **kw: GPT2Config(
        **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        | kw
    ),
    "llama": lambda **kw: LlamaConfig(**_SHAPE | kw),
    "qwen2": lambda **kw: Qwen2Config(**_SHAPE | {"tie_word_embeddings": True} | kw),
    "qwen3": lambda **kw: Qwen3Config(**_SHAPE | {"head_dim": 16} | kw),
    "mistral": lambda **kw: MistralConfig(**_SHAPE | {"sliding_window": None} | kw),
}
FAMILIES = tuple(CONFIGS)


def causal_lm(family: str, **overrides: Any) -> PreTrainedModel:
    """The same weights at every call, in evaluation mode."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[family](**overrides)).eval()


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Training mode with activation checkpointing, under the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)
    return model.train()


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One id a word of WORDS."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", **special)
