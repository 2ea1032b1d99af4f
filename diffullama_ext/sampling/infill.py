# SPDX-License-Identifier: Apache-2.0
"""Infilling text: "[MASK:12]" stands for twelve tokens to write between what is before and after."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoisers import mask_and_shift
from .generate import denoiser_of, evaluating, start_token
from .logits_hooks import LogitsHook
from .loop import StepHook, fill
from .policies import Policy
from .state import State, check_count
from .trace import Trace, recording

_SPAN = re.compile(r"\[MASK:(\d+)\]")
_MALFORMED = re.compile(r"\[MASK:(?!\d+\])[^\]\n]{0,20}\]?")


class InfillOutput(NamedTuple):
    """What :func:`infill` returns, one entry a sequence."""

    texts: list[str]  # the whole text: what was given, character for character, and what was filled in
    fills: list[list[str]]  # what was filled in, span by span
    nfe: Tensor  # [B] int64, model forwards while the row had a mask
    trace: Trace | None = None  # where it was asked for


def parse_spans(text: str) -> list[str | int]:
    """Split at "[MASK:n]": fixed text as str, spans as their number of tokens; no empty text.

    Raises:
        ValueError: no span, a span of no tokens, or "[MASK:" without a number.
    """
    if malformed := _MALFORMED.search(text):
        raise ValueError(f"text must mark spans as [MASK:n], n a number of tokens, got {malformed.group()!r}")
    pieces: list[str | int] = []
    for index, piece in enumerate(_SPAN.split(text)):  # text, number, text, number, ..., text
        if index % 2:
            pieces.append(int(piece))
        elif piece:
            pieces.append(piece)
    if not any(isinstance(piece, int) for piece in pieces):
        raise ValueError(
            f"text must have a span [MASK:n] to fill, got {text if len(text) <= 60 else text[:57] + '...'!r}"
        )
    if 0 in pieces:
        raise ValueError("[MASK:n] must be of at least 1 token, got [MASK:0]")
    return pieces


class _Codec:
    """A tokenizer for pieces of text: SentencePiece ones put a space before a text's beginning, and strip it again.

    So a piece that continues a text is coded after a line break, whose ids and characters are then taken off.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_after(self, text: str) -> list[int]:
        ids, n = self.encode("\n" + text), len(self.before)
        return ids[n:] if ids[:n] == self.before else self.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_after(self, ids: list[int]) -> str:
        return self.decode(self.before + ids).removeprefix(self.decode(self.before))


def _tokens(pieces: list[str | int], codec: _Codec, mask_id: int, start_id: int | None) -> tuple[list[int], list[bool]]:
    """Ids of one row, the mask id in its spans, and which of them are masks."""
    ids: list[int] = [] if start_id is None else [start_id]
    masked = [False] * len(ids)
    for index, piece in enumerate(pieces):
        if isinstance(piece, int):
            new = [mask_id] * piece
        else:
            new = codec.encode_after(piece) if index else codec.encode(piece)
        ids += new
        masked += [isinstance(piece, int)] * len(new)
    return ids, masked


def _texts(pieces: list[str | int], filled: list[int], codec: _Codec) -> tuple[str, list[str]]:
    """The whole text and its spans, from the ids of all spans in order."""
    text, fills, begin = "", [], 0
    for piece in pieces:
        if isinstance(piece, int):
            fills.append(codec.decode_after(filled[begin : begin + piece]))
            begin += piece
        text += piece if isinstance(piece, str) else fills[-1]
    return text, fills


def infill(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    n: int = 1,
    steps: int | None = None,
    policy: str | Policy = "confidence",
    block_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | Tensor | None = 0,
    sample_index: Tensor | None = None,
    start_id: int | None = None,
    on_step: StepHook | None = None,
    trace: bool = False,
    cfg: float = 0.0,
    negative: Callable[[State], Tensor] | None = None,
    cache: str | None = None,
    logits_hooks: Sequence[LogitsHook] = (),
    done_every: int | None = None,
) -> InfillOutput:
    """Write the spans "[MASK:n]" of a text, or of several, in one batch, from what is on both sides of them.

    Args:
        model: adapted by :func:`diffullama_ext.integrations.adapt`, in any mode; it is run without dropout.
        tokenizer: the model's, of transformers.
        text: one text or several; each has at least one span, anywhere: ``"def add(a, b):\\n    [MASK:12]\\n"``.
        n: fillings of each text, next to each other in the result.
        start_id: token put before every text under the shift, where nothing predicts the first token; None takes the
            bos id, else the eos id, of the tokenizer, else of the model.
        steps, policy, block_length, temperature, top_k, top_p, seed, sample_index, on_step, logits_hooks, done_every:
            see :func:`fill`; ``sample_index`` counts the sequences.
        trace, cfg, negative, cache: see :func:`generate`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fill`; a text without a span or with a malformed one; a model
            that is not adapted; more tokens than the model takes.
    """
    mask_id, shift = mask_and_shift(model)
    check_count("n", n)
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text must be a text or at least one, got an empty sequence")
    all_pieces = [pieces for one in texts for pieces in [parse_spans(one)] * n]
    codec = _Codec(tokenizer)
    if start_id is None:
        start_id = start_token(tokenizer, model.config, model.generation_config)
    rows = [_tokens(pieces, codec, mask_id, start_id if shift else None) for pieces in all_pieces]

    length = max(len(ids) for ids, _ in rows)
    device = next(model.parameters()).device
    xt = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows], device=device)
    masked = torch.tensor([row + [False] * (length - len(row)) for _, row in rows], device=device)
    lengths = torch.tensor([len(ids) for ids, _ in rows], device=device)
    real = torch.arange(length, device=device) < lengths[:, None]
    denoise, _ = denoiser_of(model, real, cfg=cfg, negative=negative, cache=cache)
    hook, record = recording(on_step, trace)
    with evaluating(model):
        filled = fill(
            denoise,
            xt,
            masked,
            mask_id=mask_id,
            policy=policy,
            steps=steps,
            block_length=block_length,
            shift=shift,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            sample_index=sample_index,
            on_step=hook,
            logits_hooks=logits_hooks,
            done_every=done_every,
        )
    written = [ids[row].tolist() for ids, row in zip(filled.xt, masked, strict=True)]
    results = [_texts(pieces, ids, codec) for pieces, ids in zip(all_pieces, written, strict=True)]
    return InfillOutput([whole for whole, _ in results], [fills for _, fills in results], filled.nfe, record)
