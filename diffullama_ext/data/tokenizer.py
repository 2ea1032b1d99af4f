# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer, trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256

# What merges may not cross. An indentation is a token of its own, apart from the word behind it, and so is a line end:
# the tokens around a masked line are then those of the whole text, whatever fills it. One space goes with its word.
PRE_TOKENS = r"\n+| {2,}| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``texts``; any text round-trips, unseen bytes included.

    One special token, ``<|endoftext|>`` (id 0), is bos, eos and pad, as in GPT-2. There is no mask token: adapting a
    model adds one, as it does for any published autoregressive model.

    Args:
        texts: documents to learn merges from.
        vocab_size: ids in all, at least 257 (the bytes and the special token). Little text may give fewer.
        max_length: ``model_max_length`` of the tokenizer.

    Raises:
        ValueError: vocab_size below 257.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (ACL 2016); bytes as GPT-2.
    """
    if vocab_size < N_BYTES + 1:
        raise ValueError(f"vocab_size must be at least {N_BYTES + 1} (all bytes and {END_OF_TEXT}), got {vocab_size}")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **({} if max_length is None else {"model_max_length": max_length}),
    )
