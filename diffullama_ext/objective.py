# SPDX-License-Identifier: Apache-2.0
"""The training objective: draw t, noise, run the model under the annealed mask, score what was masked.

Source: Algorithm 1 of Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models" (ICLR
2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .attention_mask import AttentionMask
from .checks import check_choice, check_range, check_tensor
from .functional import LossStats, linear_shifted_cross_entropy, mask_tokens
from .functional.random import index_tensor, seed_tensor
from .reference.philox import MASK32, TAG_TIME, philox
from .schedules import LinearNoise

NORMALIZERS = ("tokens", "masked", "sequence", "batch")
LOSS_MASKS = ("draw", "equality")

# What the released code of each system does.
RECIPES: dict[str, dict[str, str | bool]] = {
    "diffullama": {"shift": True, "normalizer": "masked", "loss_mask": "equality"},
    "llada": {"shift": False, "normalizer": "tokens"},
    "llada_sft": {"shift": False, "normalizer": "sequence"},
}


def draw_t(sample_index: Tensor, seed: int | Tensor, *, t_min: float = 1e-3, strata: int = 0) -> Tensor:
    """The noise level of each sample, uniform in (t_min, 1], as a function of (seed, sample_index) alone.

    With strata = n > 0 the samples numbered i, ..., i + n - 1 fall one into each n-th of the interval, whatever i is:
    a lower variance of the loss of n consecutive samples.

    Args:
        sample_index: [B] int64 global number of each sample.
        seed: 64 bits, int or int64 [1] on the device.
        t_min: in [0, 1).
        strata: n, or 0 for independent draws.

    Returns:
        [B] float32.
    """
    check_tensor("sample_index", sample_index, torch.int64, ("B",))
    _check_time(t_min, strata)
    zero = torch.zeros((), dtype=torch.int64, device=sample_index.device)
    key = seed_tensor(seed, None, sample_index.device)
    words = philox(zero, sample_index & MASK32, TAG_TIME, (sample_index >> 32) & MASK32, key)[:, 0]  # [B]
    u = words.double() / 2**32  # in [0, 1)
    if strata:
        u = (sample_index % strata + u) / strata
    return (1.0 - (1.0 - t_min) * u).float()


def _check_time(t_min: float, strata: int) -> None:
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min must be in [0, 1), got {t_min!r}")
    check_range("strata", strata, 0, 2**31 - 1)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The choices in which the published objectives differ; ``recipe`` has theirs.

    Attributes:
        mask_id: id of the mask token.
        shift: logits row i predicts token i+1 (an adapted AR model).
        t_min: t is uniform in (t_min, 1].
        strata: see :func:`draw_t`.
        normalizer: "tokens" (the ELBO per token), "masked", "sequence" or "batch": see
            :func:`diffullama_ext.shifted_cross_entropy`.
        loss_mask: "draw" scores the tokens that were masked; "equality" every token with ``xt == mask_id``, which also
            takes real tokens that happen to have that id (the released DiffuLLaMA code).
    """

    mask_id: int
    shift: bool = True
    t_min: float = 1e-3
    strata: int = 0
    normalizer: str = "tokens"
    loss_mask: str = "draw"

    def __post_init__(self) -> None:
        check_range("mask_id", self.mask_id, 0, 2**63 - 1)
        _check_time(self.t_min, self.strata)
        check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("loss_mask", self.loss_mask, LOSS_MASKS)

    @classmethod
    def recipe(cls, name: str, *, mask_id: int) -> ObjectiveConfig:
        """What a released code does: "diffullama", "llada" (pre-training) or "llada_sft"."""
        check_choice("recipe", name, tuple(RECIPES))
        return cls(mask_id=mask_id, **RECIPES[name])  # type: ignore[arg-type]


class ObjectiveOutput(NamedTuple):
    """What one call of the objective computed."""

    loss: Tensor  # scalar
    stats: LossStats  # sums, for averages over micro-batches and ranks
    masked: Tensor  # [B, L] bool, the scored tokens
    t: Tensor  # [B] float32


class _Batch(NamedTuple):
    """A noised batch and what of it is scored."""

    xt: Tensor  # [B, L] int64
    scored: Tensor  # [B, L] bool, masked tokens that a logits row predicts
    scorable: Tensor  # [B, L] bool, tokens that could have been scored
    t: Tensor  # [B] float32


def _count_for_host(scored: Tensor) -> Callable[[], int | None]:
    """Start bringing the number of True entries to the host; the result reads it, None where the op may ask itself.

    On CUDA the copy is queued before the model's forward and read after: the wait ends while the forward still runs, so
    the device never idles.
    """
    if scored.device.type != "cuda":
        return lambda: None
    if torch.cuda.is_current_stream_capturing():  # replays have other counts: bound them all
        return scored.numel
    count = torch.empty((), dtype=torch.int64, pin_memory=True)
    count.copy_(scored.sum(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(scored.device))

    def read() -> int | None:
        if torch.compiler.is_compiling():  # a number would be a constant of the graph
            return None
        copied.synchronize()
        return int(count)

    return read


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


class DiffusionObjective:
    """The masked diffusion loss of a model adapted with :func:`diffullama_ext.integrations.adapt`.

    ``objective(model, x0, seed=seed, step=step)`` draws the noise, calls ``model``, which may be wrapped (DDP, FSDP2,
    peft), and computes the loss from the last hidden states and the head's weight, never holding the logits [B, L, V].
    The loss is computed inside the model's forward and is what the (wrapped) forward returns, so wrappers that gather
    parameters or synchronise gradients see an ordinary loss.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def __call__(
        self,
        model: nn.Module,
        x0: Tensor,
        *,
        maskable: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attn_mask_ratio: float | Tensor = 1.0,
        seed: int | Tensor,
        step: int | Tensor = 0,
        sample_index: Tensor | None = None,
        t: Tensor | None = None,
        normalizer: str | float | Tensor | None = None,
    ) -> ObjectiveOutput:
        """The loss of one batch; (seed, step, sample_index) give the same noise in any batch and on any device.

        Args:
            model: an adapted model, or a wrapper of one.
            x0: [B, L] int64 clean tokens.
            maskable: [B, L] bool, False protects prompts; None means all.
            attention_mask: [B, L] bool or int, 0 for padding (on either side), which is not scored; None means none.
            attn_mask_ratio: 0 causal ... 1 bidirectional, or float32 [1] on the device.
            seed, step: ints or int64 [1]; t and the noise depend on (seed, sample_index), the attention mask on
                (seed, step).
            sample_index: [B] int64 global numbers of the sequences; None means 0..B-1.
            t: [B] float32 noise levels in (0, 1]; None draws them.
            normalizer: a name, or the denominator itself (its sum over ranks and micro-batches); None: the config's.
        """
        batch = self._noise(x0, maskable, attention_mask, seed, sample_index, t)
        n_scored = _count_for_host(batch.scored)
        length = x0.shape[1]
        inputs = {
            "input_ids": batch.xt,
            "diffusion_mask": AttentionMask.annealed(length, attn_mask_ratio, seed=seed, step=step, device=x0.device),
            "logits_to_keep": 1,  # the model's own logits are not used
        }
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
            inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # the same for either side

        def score(
            hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
        ) -> tuple[Tensor, LossStats]:
            return linear_shifted_cross_entropy(
                hidden,
                weight,
                x0,
                batch.scored,
                loss_weight=LinearNoise().loss_weight(batch.t),
                bias=bias,
                maskable=batch.scorable,
                shift=self.config.shift,
                normalizer=self.config.normalizer if normalizer is None else normalizer,
                softcap=softcap,
                max_scored=n_scored(),
            )

        loss, stats = _forward_to_loss(model, inputs, score)
        return ObjectiveOutput(loss, stats, batch.scored, batch.t)

    def denominator(
        self,
        x0: Tensor,
        *,
        maskable: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seed: int | Tensor,
        sample_index: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """What the config's normalizer divides this batch by, int64 scalar, before any model runs.

        Sums of it over micro-batches and ranks make a loss that no split of the batch changes: the gradient of
        ``stats.weighted_sum / total`` summed over all of them.
        """
        if self.config.normalizer in ("sequence", "batch"):
            return torch.full((), x0.shape[0], device=x0.device)
        if self.config.normalizer == "masked":
            return self._noise(x0, maskable, attention_mask, seed, sample_index, t).scored.sum()
        maskable, predicted = self._targets(x0, maskable, attention_mask)
        return (maskable & predicted).sum()

    def _targets(self, x0: Tensor, maskable: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, L] bool each: tokens that may be masked, and real tokens that the logits row of a real token predicts."""
        check_tensor("x0", x0, torch.int64, ("B", "L"))
        if maskable is None:
            maskable = torch.ones_like(x0, dtype=torch.bool)
        check_tensor("maskable", maskable, torch.bool, tuple(x0.shape), x0.device)
        predicted = torch.ones_like(maskable)
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, (torch.bool, torch.int64), tuple(x0.shape), x0.device)
            predicted &= attention_mask.bool()
        if self.config.shift:
            predicted[:, 1:] &= predicted[:, :-1].clone()
            predicted[:, :1] = False
        return maskable, predicted

    def _noise(
        self,
        x0: Tensor,
        maskable: Tensor | None,
        attention_mask: Tensor | None,
        seed: int | Tensor,
        sample_index: Tensor | None,
        t: Tensor | None,
    ) -> _Batch:
        config = self.config
        maskable, predicted = self._targets(x0, maskable, attention_mask)
        sample_index = index_tensor("sample_index", sample_index, x0.shape[0], x0.device)
        if t is None:
            t = draw_t(sample_index, seed, t_min=config.t_min, strata=config.strata)
        check_tensor("t", t, torch.float32, (x0.shape[0],), x0.device)
        xt, masked, _, _ = mask_tokens(
            x0,
            LinearNoise().p_mask(t),
            mask_id=config.mask_id,
            maskable=maskable,
            seed=seed,
            sample_index=sample_index,
        )
        if config.loss_mask == "equality":
            masked = xt == config.mask_id
        return _Batch(xt, masked & predicted, maskable & predicted, t)


_CHECKED_HEADS: WeakSet[nn.Module] = WeakSet()


def _check_head(causal_lm: nn.Module, expected: Tensor, logits: Tensor) -> None:
    """Once a model: its logits are those of the head alone. Some architectures scale or bias them elsewhere."""
    difference = (logits[:, -1:].float() - expected.float()).abs().max()
    if difference > 0.05 * logits.float().abs().max():
        raise ValueError(
            f"the logits of {type(causal_lm).__name__} are not its head's output (they differ by {difference:.3g}), so "
            "the loss cannot be computed from its hidden states"
        )
    _CHECKED_HEADS.add(causal_lm)


def _forward_to_loss(
    model: nn.Module, inputs: dict[str, object], score: Callable[..., tuple[Tensor, LossStats]]
) -> tuple[Tensor, LossStats]:
    """Call ``model`` so that its forward returns (loss, stats) = score(hidden, weight, bias, softcap).

    Two hooks, for this call alone. The decoder's makes the loss inside the model's forward, where autocast is on and
    the head's weight is whole (FSDP2 shards it outside). The model's replaces the output before a wrapper's own hooks
    see it (prepend): DDP and FSDP2 arrange their backward by the tensors that the forward returns.
    """
    causal_lm = _causal_lm(model)
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"the head is a {type(head).__name__} of an adapter, whose weight is not all of it: leave it out of "
            "target_modules, or train it whole by modules_to_save"
        )
    if causal_lm.config._attn_implementation != "diffullama":  # any other drops diffusion_mask without a word
        raise ValueError(
            f"the model's attention must be 'diffullama', got {causal_lm.config._attn_implementation!r}; "
            "call diffullama_ext.integrations.prepare(model)"
        )
    softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
    made: list[tuple[Tensor, LossStats]] = []
    expected: list[Tensor] = []

    def at_decoder(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        hidden, bias = output[0], getattr(head, "bias", None)
        made.append(score(hidden, head.weight, bias, softcap))
        if causal_lm not in _CHECKED_HEADS:
            logits = nn.functional.linear(hidden[:, -1:].detach(), head.weight.detach(), bias)
            expected.append(softcap * torch.tanh(logits / softcap) if softcap else logits)

    def at_model(module: nn.Module, args: object, output: Any) -> tuple[Tensor, ...]:
        if not made:
            raise ValueError(f"the forward of {type(causal_lm).__name__} does not call its {type(decoder).__name__}")
        if expected:
            _check_head(causal_lm, expected[0], output.logits)
        loss, stats = made[0]
        return (loss, *stats)

    handles = (decoder.register_forward_hook(at_decoder), causal_lm.register_forward_hook(at_model, prepend=True))
    try:
        loss, *stats = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return loss, LossStats(*stats)
