# SPDX-License-Identifier: Apache-2.0
"""Sampling from an adapted transformers model: the adapter that makes it a denoiser, and continuation of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_tensor
from .loop import StepHook, fill
from .policies import Policy
from .state import check_count


class SampleOutput(NamedTuple):
    """What :func:`generate` returns."""

    sequences: Tensor  # [B, P + length] int64: the prompts as given, then what was generated
    nfe: Tensor  # [B] int64, model forwards while the row had a mask


@dataclass(frozen=True)
class ModelDenoiser:
    """A transformers model with bidirectional attention as ``ids [B, L] -> logits [B, L, V]``.

    Attributes:
        model: called as ``model(input_ids=..., attention_mask=..., use_cache=False).logits``.
        attention_mask: bool [B, L], False where a row is padding; None without padding.
    """

    model: nn.Module
    attention_mask: Tensor | None = None

    def __call__(self, xt: Tensor) -> Tensor:
        """Logits [B, L, V]; row i scores position i + 1 where the model has the shift."""
        return self.model(input_ids=xt, attention_mask=self.attention_mask, use_cache=False).logits.to(xt.device)

    @classmethod
    def of_rows(cls, model: Any, real: Tensor) -> ModelDenoiser:
        """For rows that begin at column 0; ``real`` bool [B, L] is False in the padding after them."""
        length, longest = real.shape[1], getattr(model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ValueError(f"the sequence has {length} tokens, given ones and masks, and the model takes {longest}")
        return cls(model, None if real.all() else real)


def mask_and_shift(model: Any) -> tuple[int, bool]:
    """The mask id and the shift from an adapted model's config; ValueError where it is not adapted."""
    mask_id = getattr(model.config, "mask_token_id", None)
    diffusion = getattr(model.config, "diffusion", None)
    if mask_id is None or diffusion is None:
        raise ValueError(
            f"model must be adapted to diffusion (diffullama_ext.integrations.adapt), got {type(model).__name__} whose "
            f"config has mask_token_id={mask_id}, diffusion={diffusion}"
        )
    return mask_id, diffusion["shift"]


def start_token(*sources: object) -> int | None:
    """The first bos id, else eos id, of tokenizers, configs and generation configs; None where they have none."""
    for name in ("bos_token_id", "eos_token_id"):
        for source in sources:
            value = getattr(source, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_prompts(prompt_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which prompt tokens are real, bool [B, P]; at least one in every row."""
    check_tensor("prompt_ids", prompt_ids, torch.int64, ("B", "P"))
    if attention_mask is None:
        attention_mask = torch.ones_like(prompt_ids)
    check_tensor("attention_mask", attention_mask, (torch.int64, torch.bool), tuple(prompt_ids.shape))
    real = attention_mask.bool()
    if not real.any(dim=1).all():
        rows = (~real.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"prompt_ids must have a real token in every row, got none in rows {rows}; None is no prompt")
    return real


def generate(
    model: Any,
    *,
    length: int,
    prompt_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
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
) -> SampleOutput:
    """Continue prompts, or write from nothing, with an adapted model.

    Prompts of different lengths are padded, on either side, and marked by ``attention_mask``. Inside, every row begins
    at column 0 (``on_step`` sees it so) and the padding is not attended to: the side makes no difference to the text.

    Args:
        model: adapted by :func:`diffullama_ext.integrations.adapt`, in any mode; it is run without dropout.
        length: tokens to generate in every row.
        prompt_ids: int64 [B, P], with start tokens if you want them. None: no prompt; under the shift a start token
            then stands before the text and is dropped from the result.
        attention_mask: int64 or bool [B, P], 0 for padding; None means no padding.
        n: sequences for each prompt, next to each other; without a prompt, the number of sequences.
        start_id: the start token where there is no prompt; None takes the model's bos id, else its eos id.
        steps, policy, block_length, temperature, top_k, top_p, seed, sample_index, on_step: see :func:`fill`;
            ``sample_index`` counts the B * n sequences.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fill`; a model that is not adapted; an empty prompt; more tokens
            than the model takes.
    """
    mask_id, shift = mask_and_shift(model)
    check_count("length", length)
    check_count("n", n)
    device = next(model.parameters()).device
    first = None
    if prompt_ids is None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None without prompt_ids")
        if shift:
            first = start_token(model.config, model.generation_config) if start_id is None else start_id
        prompt_ids = torch.full((1, 0 if first is None else 1), first or 0, device=device)
        real = torch.ones_like(prompt_ids, dtype=torch.bool)
    else:
        real = _check_prompts(prompt_ids, attention_mask)
    prompt = prompt_ids.to(device).repeat_interleave(n, dim=0)
    real = real.to(device).repeat_interleave(n, dim=0)

    new = prompt.new_full((len(prompt), length), mask_id)
    ids, real = torch.cat((prompt, new), dim=1), torch.cat((real, torch.ones_like(new, dtype=torch.bool)), dim=1)
    masked = torch.arange(ids.shape[1], device=device).expand_as(ids) >= prompt.shape[1]
    order = torch.argsort(real.logical_not().to(torch.int8), dim=1, stable=True)  # real tokens first, padding after
    with evaluating(model):
        filled = fill(
            ModelDenoiser.of_rows(model, real.gather(1, order)),
            ids.gather(1, order),
            masked.gather(1, order),
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
            on_step=on_step,
        )
    sequences = torch.empty_like(ids).scatter_(1, order, filled.xt)
    return SampleOutput(sequences if first is None else sequences[:, 1:], filled.nfe)
