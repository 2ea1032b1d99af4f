# SPDX-License-Identifier: Apache-2.0
"""Score the hidden states inside a model's own forward, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .config import ObjectiveConfig

# (hidden [B, L, H], head's weight [V, H], its bias [V] or None, softcap or None) -> tensors
Score = Callable[[Tensor, Tensor, "Tensor | None", "float | None"], tuple[Tensor, ...]]


def _causal_lm(model: Any) -> Any:
    """The transformers causal language model inside any wrapper: DDP, FSDP, torch.compile, peft."""
    for module in model.modules():
        # Looked up on the type, because peft forwards attributes of the model that it wraps.
        if hasattr(type(module), "get_output_embeddings") and module.get_output_embeddings() is not None:
            return module
    raise TypeError(
        f"model must be or wrap a transformers causal language model, got {type(model).__name__}; with another model "
        "call mask_tokens and linear_shifted_cross_entropy directly"
    )


def check_ids(model: nn.Module, config: ObjectiveConfig) -> None:
    """ValueError where the noise writes ids that the model has no embedding for."""
    weight = getattr(_causal_lm(model).get_input_embeddings(), "weight", None)
    if weight is None:  # an adapter's, of another form
        return
    for name, highest in (("mask_id", config.mask_id), ("vocab_size", (config.vocab_size or 1) - 1)):
        if highest >= weight.shape[0]:
            raise ValueError(
                f"{name} must be within the model's {weight.shape[0]} embeddings, got {getattr(config, name)}; resize "
                "them, or let diffullama_ext.integrations.adapt add the mask token"
            )


_CHECKED_HEADS: WeakSet[nn.Module] = WeakSet()


def _check_head(causal_lm: nn.Module, expected: Tensor, logits: Tensor) -> None:
    """Once a model: its logits are those of the head alone. Some architectures scale or bias them elsewhere."""
    difference = (logits - expected).abs().max()
    if difference > 0.05 * logits.abs().max():
        raise ValueError(
            f"the logits of {type(causal_lm).__name__} are not its head's output (they differ by {difference:.3g}), so "
            "the loss cannot be computed from its hidden states"
        )
    _CHECKED_HEADS.add(causal_lm)


def head_weight(head: Any) -> Tensor:
    """[V, H] of the head; with the rows that peft trains apart (trainable_token_indices) of a tied embedding.

    ValueError where it holds no such numbers itself: quantised (bitsandbytes, torchao) or partitioned (ZeRO-3).
    """
    adapter = getattr(head, "token_adapter", None)
    weight = head.weight if adapter is None else adapter.get_merged_weights(adapter.active_adapters)
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(
            f"the head's weight must be whole floating point numbers [V, H], got {type(weight).__name__} "
            f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}; where the model is quantised leave the "
            "head out (llm_int8_skip_modules or modules_to_not_convert=['lm_head']), and use ZeRO-2 or FSDP2 for ZeRO-3"
        )
    return weight


def check_attention(causal_lm: Any) -> None:
    """ValueError where the model's attention would drop a diffusion_mask without a word."""
    if causal_lm.config._attn_implementation != "diffullama":
        raise ValueError(
            f"the model's attention must be 'diffullama', got {causal_lm.config._attn_implementation!r}; "
            "call diffullama_ext.integrations.prepare(model)"
        )


def forward_to_score(model: nn.Module, inputs: dict[str, object], score: Score) -> tuple[Tensor, ...]:
    """Call ``model`` so that its forward returns score(hidden, weight, bias, softcap).

    Two hooks, for this call alone. The decoder's scores inside the model's forward, where autocast is on and
    the head's weight is whole (FSDP2 shards it outside). The model's replaces the output before a wrapper's own hooks
    see it (prepend): DDP and FSDP2 arrange their backward by the tensors that the forward returns.
    """
    causal_lm = _causal_lm(model)
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    if hasattr(head, "base_layer") and not hasattr(head, "token_adapter"):
        raise ValueError(
            f"the head is a {type(head).__name__} of an adapter, whose weight is not all of it: leave it out of "
            "target_modules, or train it whole by modules_to_save"
        )
    check_attention(causal_lm)
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    made: list[tuple[Tensor, ...]] = []
    last: list[Tensor] = []  # logits of the last token, the head's and the model's

    def at_decoder(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        if hasattr(head, "unshard"):  # FSDP2 sharded the head alone, and gathers it after the decoder
            head.unshard()
        hidden, bias = output[0], getattr(head, "bias", None)
        weight = head_weight(head)
        made.append(score(hidden, weight, bias, softcap))
        if is_compiling() or causal_lm not in _CHECKED_HEADS:  # a compiled graph is the same at every step
            logits = nn.functional.linear(hidden[:, -1:].detach(), weight.detach(), bias)
            last.append(softcap * torch.tanh(logits / softcap) if softcap else logits)

    def at_model(module: nn.Module, args: object, output: Any) -> tuple[Tensor, ...]:
        if not made:
            raise ValueError(f"the forward of {type(causal_lm).__name__} does not call its {type(decoder).__name__}")
        if last:
            last.append(output.logits[:, -1:].detach())
        return made[0]

    handles = (decoder.register_forward_hook(at_decoder), causal_lm.register_forward_hook(at_model, prepend=True))
    try:
        output = model(**inputs, logits_to_keep=1)  # the model's own logits are not used
    finally:
        for handle in handles:
            handle.remove()
    if last and not is_compiling() and causal_lm not in _CHECKED_HEADS:
        _check_head(causal_lm, last[0].float(), last[1].float())
    return output
