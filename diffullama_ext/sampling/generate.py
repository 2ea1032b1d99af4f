# SPDX-License-Identifier: Apache-2.0
"""Sampling from an adapted transformers model: continuation of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_tensor
from .denoisers import Guided, ModelDenoiser, RowDenoiser, mask_and_shift, without_context
from .logits_hooks import LogitsHook
from .loop import StepHook, fill
from .policies import Policy
from .state import State, check_count
from .trace import Trace, recording

if TYPE_CHECKING:
    from .caches import CachedDenoiser, CacheDrift


class SampleOutput(NamedTuple):
    """What :func:`generate` returns."""

    sequences: Tensor  # [B, P + length] int64: the prompts as given, then what was generated
    nfe: Tensor  # [B] int64, model forwards while the row had a mask
    completion_tokens: Tensor  # [B] int64, what was generated, up to and with the first eos_id if one was given
    cache_drift: CacheDrift | None = None  # where it was measured
    trace: Trace | None = None  # where it was asked for


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


def denoiser_of(
    model: Any,
    real: Tensor,
    *,
    cfg: float = 0.0,
    negative: Callable[[State], Tensor] | None = None,
    cache: str | None = None,
    measure_drift: bool = False,
    cuda_graph: bool = False,
) -> tuple[RowDenoiser, CachedDenoiser | None]:
    """A model for :func:`fill`, and its cache if it has one.

    Args:
        real: bool [B, L], rows from column 0, False in the padding after them.
        cfg, negative: weight and other branch of :class:`Guided`; weight 0 is one branch.
        cache: None, or a kind of :class:`~diffullama_ext.sampling.caches.CachedDenoiser`; each branch has its own.
        cuda_graph: each branch is a :class:`~diffullama_ext.sampling.cuda_graphs.GraphedDenoiser`.
    """
    plain = ModelDenoiser.of_rows(model, real)
    cached = None
    if cuda_graph and (cache is not None or real.device.type != "cuda"):
        raise ValueError(f"cuda_graph needs a CUDA device and no cache, got {real.device} and cache={cache!r}")

    def branch(measure: bool) -> RowDenoiser:
        if cuda_graph:
            from .cuda_graphs import GraphedDenoiser

            return GraphedDenoiser(plain)
        if cache is None:
            return plain
        from .caches import CachedDenoiser

        return CachedDenoiser(plain.model, plain.attention_mask, cache, measure)

    denoise: RowDenoiser = branch(measure_drift)
    if cache is not None:
        cached = denoise
    elif measure_drift:
        raise ValueError("measure_drift must be False without a cache")
    if cfg != 0.0:
        denoise = Guided(denoise, cfg, negative or without_context, branch(False))
    elif negative is not None:
        raise ValueError("negative must be None where cfg is 0")
    return denoise, cached  # type: ignore[return-value]


def count_completion(written: Tensor, eos_id: int | None) -> Tensor:
    """Tokens of each row [B, N] up to and with the first ``eos_id``, int64 [B]; all where there is none."""
    if eos_id is None:
        return torch.full_like(written[:, 0], written.shape[1])
    ended = (written == eos_id).cumsum(dim=1) > 0
    return ((~ended).sum(dim=1) + 1).clamp(max=written.shape[1])


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


def _start(model: Any, shift: bool, start_id: int | None) -> Tensor:
    """[1, 1] the token that a shifted model starts from; [1, 0] where there is none."""
    if not shift:
        return torch.empty(1, 0, dtype=torch.int64)
    first = start_token(model.config, model.generation_config) if start_id is None else start_id
    return torch.full((1, 0 if first is None else 1), first or 0)


def _check_ids(prompt_ids: Tensor, vocab_size: int | None) -> None:
    """Every id has an embedding, a padding's too: a device would fail without a word of which."""
    outside = prompt_ids[(prompt_ids < 0) | (prompt_ids >= (vocab_size or 2**63 - 1))]
    if len(outside):
        raise ValueError(
            f"prompt_ids and start_id must be in the model's vocabulary of {vocab_size} tokens, got {outside[0].item()}"
        )


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
    trace: bool = False,
    eos_id: int | None = None,
    cfg: float = 0.0,
    negative: Callable[[State], Tensor] | None = None,
    cache: str | None = None,
    measure_drift: bool = False,
    logits_hooks: Sequence[LogitsHook] = (),
    done_every: int | None = None,
    cuda_graph: bool = False,
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
        steps, policy, temperature, top_k, top_p, seed, sample_index, on_step, logits_hooks, done_every: see
            :func:`fill`; ``sample_index`` counts the B * n sequences.
        block_length: see :func:`fill`; it must divide ``length``.
        trace: record the run, see :class:`Trace`; a Trace with other limits can be given as ``on_step``.
        eos_id: ends a row, see :func:`fill`; None lets it write ``length`` tokens whatever they are.
        cfg, negative: weight and other branch of classifier-free guidance, see :class:`Guided`; 0 is none. It takes two
            forwards a step, and ``nfe`` counts both.
        cache: "prefix" or "dual" (approximate), "block" (exact, for models trained with block-causal attention); see
            :mod:`diffullama_ext.sampling.caches`. None computes everything in every step.
        measure_drift: run the full forward too and report ``cache_drift``.
        cuda_graph: capture the forward in the first step and replay it in the others; on CUDA, without a cache.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fill`; a model that is not adapted; an empty prompt; an id that
            the model has no embedding for; more tokens than it takes.
    """
    mask_id, shift = mask_and_shift(model)
    check_count("length", length)
    check_count("n", n)
    if block_length is not None:
        check_count("block_length", block_length)
        if length % block_length:
            raise ValueError(f"block_length must divide length {length}, got {block_length}")
    device = next(model.parameters()).device
    n_start = 0  # tokens before the text
    if prompt_ids is None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None without prompt_ids")
        prompt_ids = _start(model, shift, start_id).to(device)
        n_start = prompt_ids.shape[1]
        real = torch.ones_like(prompt_ids, dtype=torch.bool)
    else:
        real = _check_prompts(prompt_ids, attention_mask)
    _check_ids(prompt_ids, getattr(model.config, "vocab_size", None))
    prompt = prompt_ids.to(device).repeat_interleave(n, dim=0)
    real = real.to(device).repeat_interleave(n, dim=0)

    new = prompt.new_full((len(prompt), length), mask_id)
    ids, real = torch.cat((prompt, new), dim=1), torch.cat((real, torch.ones_like(new, dtype=torch.bool)), dim=1)
    masked = torch.arange(ids.shape[1], device=device).expand_as(ids) >= prompt.shape[1]
    order = torch.argsort(real.logical_not().to(torch.int8), dim=1, stable=True)  # real tokens first, padding after
    denoise, cached = denoiser_of(
        model,
        real.gather(1, order),
        cfg=cfg,
        negative=negative,
        cache=cache,
        measure_drift=measure_drift,
        cuda_graph=cuda_graph,
    )
    hook, record = recording(on_step, trace)
    with evaluating(model):
        filled = fill(
            denoise,
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
            on_step=hook,
            logits_hooks=logits_hooks,
            eos_id=eos_id,
            done_every=done_every,
        )
    sequences = torch.empty_like(ids).scatter_(1, order, filled.xt)
    completion = count_completion(sequences[:, -length:], eos_id)
    drift = None if cached is None else cached.drift()
    return SampleOutput(sequences[:, n_start:], filled.nfe, completion, drift, record)
