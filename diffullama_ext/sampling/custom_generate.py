# SPDX-License-Identifier: Apache-2.0
"""Decoding by unmasking behind transformers' own ``model.generate``, as its ``custom_generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .generate import generate
from .loop import StepHook
from .policies import Policy

# What transformers makes of temperature, top_k, top_p, max_new_tokens and eos_token_id, which are honoured here.
_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


@dataclass
class UnmaskingOutput(GenerateDecoderOnlyOutput):
    """With ``return_dict_in_generate=True``: ``sequences`` [B, P + new] as of transformers, and the forwards taken."""

    nfe: Tensor | None = None  # [B] int64


def unmasking(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: object = None,
    *,
    steps: int | None = None,
    policy: str | Policy = "confidence",
    block_length: int | None = None,
    step_cache: str | None = None,
    cfg: float = 0.0,
    seed: int | Tensor | None = None,
    on_step: StepHook | None = None,
    **model_kwargs: Any,
) -> Tensor | UnmaskingOutput:
    """The decoding loop for ``model.generate(**inputs, custom_generate=unmasking, max_new_tokens=64, steps=32)``.

    transformers calls it with the prompt and its generation config. ``max_new_tokens`` or ``max_length`` (exactly so
    many tokens are written), ``do_sample`` (False is greedy), ``temperature``, ``top_k``, ``top_p``,
    ``num_return_sequences``, ``eos_token_id``, ``pad_token_id`` (behind the first eos; without one, eos),
    ``attention_mask`` with padding on either side, and ``return_dict_in_generate`` mean what they do there. What has no
    meaning here is refused, not ignored: beams, streamers, other logits processors and stopping criteria.

    Args:
        steps, policy, block_length, cfg, seed, on_step: of :func:`generate`, and keywords of ``model.generate``.
            ``seed`` None draws one from torch's generator, as transformers does.
        step_cache: ``cache`` of :func:`generate`; by that name transformers has its own.

    Returns:
        int64 [B * num_return_sequences, P + max_new_tokens], or :class:`UnmaskingOutput`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`generate`; an option of ``model.generate`` without a meaning.
    """
    _refuse("logits processor", logits_processor, _PROCESSORS)
    _refuse("stopping criterion", stopping_criteria, _CRITERIA)
    if generation_config.num_beams != 1:
        raise ValueError(f"num_beams must be 1 for decoding by unmasking, got {generation_config.num_beams}")
    for name, value in (("streamer", streamer), ("inputs_embeds", model_kwargs.get("inputs_embeds"))):
        if value is not None:
            raise ValueError(f"{name} must be None for decoding by unmasking, which does not go from left to right")
    length = generation_config.max_length - input_ids.shape[1]
    drawn = bool(generation_config.do_sample)
    eos_ids = _ids(generation_config.eos_token_id)
    out = generate(
        model,
        length=length,
        prompt_ids=input_ids,
        attention_mask=model_kwargs.get("attention_mask"),
        steps=steps,
        policy=policy,
        block_length=block_length,
        temperature=generation_config.temperature if drawn else 0.0,
        top_k=(generation_config.top_k or None) if drawn else None,
        top_p=generation_config.top_p if drawn else 1.0,
        seed=seed,
        on_step=on_step,
        eos_id=eos_ids[0] if len(eos_ids) == 1 else None,
        cache=step_cache,
        cfg=cfg,
    )
    sequences = out.sequences
    if eos_ids:
        pad_id = generation_config.pad_token_id
        sequences = _padded(sequences, length, eos_ids, eos_ids[0] if pad_id is None else pad_id)
    if generation_config.return_dict_in_generate:
        return UnmaskingOutput(sequences=cast(torch.LongTensor, sequences), nfe=out.nfe)
    return sequences


def _refuse(what: str, given: Sequence[Any], known: tuple[type, ...]) -> None:
    for one in given:
        if not isinstance(one, known):
            raise ValueError(f"{type(one).__name__} is a {what} that decoding by unmasking does not take")


def _ids(value: int | list[int] | Tensor | None) -> list[int]:
    if value is None:
        return []
    return torch.as_tensor(value).flatten().tolist()


def _padded(sequences: Tensor, length: int, eos_ids: list[int], pad_id: int) -> Tensor:
    """With ``pad_id`` behind the first eos of the last ``length`` tokens."""
    prompt, written = sequences[:, :-length], sequences[:, -length:]
    ends = torch.isin(written, torch.tensor(eos_ids, device=written.device)).long()
    behind = ends.cumsum(dim=1) - ends > 0
    return torch.cat((prompt, torch.where(behind, pad_id, written)), dim=1)
