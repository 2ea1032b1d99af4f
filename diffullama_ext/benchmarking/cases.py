# SPDX-License-Identifier: Apache-2.0
"""What is measured of each op: a shape, inputs of it, and one call. Letters as in the ops' documentation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention_mask import AttentionMask
from ..functional import (
    linear_shifted_cross_entropy,
    mask_tokens,
    shifted_cross_entropy,
    token_log_probs,
    token_stats,
    unmask,
)
from .attention_inputs import (
    attention_flops,
    attention_inputs,
    attention_sizes,
    backward_inputs,
    run_attention,
    run_attention_backward,
)

Size = int | float | str
SEED = 7


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the public function, annealed_mask or attention_backward.
        shape: sizes and options; the keys are all that ``at`` accepts.
        small: sizes that a CPU gets instead.
        make: (shape, dtype, device) -> inputs; every tensor that the op can take is made beforehand.
        run: one call on the inputs; whole training steps where the op has a backward.
        flops: of the matrix products of one call.
        plan: the sizes of inputs that kernel_plan takes; None where the op has no plan.
        takes_floats: whether the dtype matters.
    """

    op: str
    shape: Mapping[str, Size]
    small: Mapping[str, Size]
    make: Callable[[Any, torch.dtype, torch.device], Any]
    run: Callable[[Any], Any]
    flops: Callable[[Any], int] = lambda _inputs: 0
    plan: Callable[[Any], dict[str, int]] | None = None
    takes_floats: bool = True

    def at(self, **sizes: Size) -> Case:
        """The same op at another shape; ValueError for a size that it does not have, or of the wrong kind."""
        for name, size in sizes.items():
            if name not in self.shape:
                raise ValueError(f"{self.op} has no size {name!r}; it has {', '.join(self.shape)}")
            if isinstance(size, str) != isinstance(self.shape[name], str):
                raise ValueError(f"{name} of {self.op} must be like {self.shape[name]!r}, got {size!r}")
        return replace(self, shape={**self.shape, **sizes})

    def inputs(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The same for every implementation and every run."""
        torch.manual_seed(SEED)
        return self.make(self.shape, dtype, device)

    def describe(self) -> str:
        """ "N=4096 V=32000 temperature=0"."""
        return " ".join(f"{name}={size}" for name, size in self.shape.items())


@contextmanager
def running(impl: str) -> Iterator[None]:
    """Inside, calls that name no implementation run this one: "auto", "ext" or "reference"."""
    before = os.environ.get("DIFFULLAMA_IMPL")
    os.environ["DIFFULLAMA_IMPL"] = impl
    try:
        yield
    finally:
        del os.environ["DIFFULLAMA_IMPL"]
        if before is not None:
            os.environ["DIFFULLAMA_IMPL"] = before


class Keys(NamedTuple):
    """What makes a draw repeatable, on the device."""

    seed: Tensor  # int64 [1]
    step: Tensor  # int64 [1]
    numbers: Tensor  # int64 [n], of samples or rows


def _keys(n: int, device: torch.device) -> Keys:
    one = torch.full((1,), SEED, dtype=torch.int64, device=device)
    return Keys(one, one.clone(), torch.arange(n, device=device))


# --- noising ---------------------------------------------------------------------------------------------------------


class NoisingInputs(NamedTuple):
    """Of mask_tokens."""

    x0: Tensor  # [B, L] int64
    p_mask: Tensor  # [B] float32
    mask_id: int
    keys: Keys


def _noising_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> NoisingInputs:
    x0 = torch.randint(0, 32000, (s["B"], s["L"]), device=device)
    return NoisingInputs(x0, 0.001 + 0.999 * torch.rand(s["B"], device=device), 32000, _keys(s["B"], device))


def _run_noising(i: NoisingInputs) -> tuple[Tensor, ...]:
    return mask_tokens(i.x0, i.p_mask, mask_id=i.mask_id, seed=i.keys.seed, sample_index=i.keys.numbers)


# --- attention mask --------------------------------------------------------------------------------------------------


class MaskInputs(NamedTuple):
    """Of AttentionMask.annealed."""

    length: int
    ratio: Tensor  # float32 [1]
    keys: Keys


def _mask_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> MaskInputs:
    return MaskInputs(s["L"], torch.full((1,), s["ratio"], device=device), _keys(1, device))


def _run_mask(i: MaskInputs) -> Tensor:
    return AttentionMask.annealed(i.length, i.ratio, seed=i.keys.seed, step=i.keys.step).words


# --- losses ----------------------------------------------------------------------------------------------------------


class LogitsLossInputs(NamedTuple):
    """Of shifted_cross_entropy."""

    logits: Tensor  # [B, L, V]
    x0: Tensor  # [B, L] int64
    masked: Tensor  # [B, L] bool
    loss_weight: Tensor  # [B] float32


class LinearLossInputs(NamedTuple):
    """Of linear_shifted_cross_entropy and token_log_probs."""

    hidden: Tensor  # [B, L, H]
    weight: Tensor  # [V, H]
    x0: Tensor  # [B, L] int64
    masked: Tensor  # [B, L] bool
    loss_weight: Tensor  # [B] float32
    n_scored: int  # tokens that a row predicts: known to the host beforehand, as in DiffusionObjective


def _targets(s: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x0, masked, loss_weight."""
    size = (s["B"], s["L"])
    x0, masked = torch.randint(0, s["V"], size, device=device), torch.rand(size, device=device) < s["p"]
    return x0, masked, 1 + 4 * torch.rand(s["B"], device=device)


def _logits_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> LogitsLossInputs:
    logits = torch.randn(s["B"], s["L"], s["V"], dtype=dtype, device=device).requires_grad_()
    return LogitsLossInputs(logits, *_targets(s, device))


def _linear_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> LinearLossInputs:
    hidden = torch.randn(s["B"], s["L"], s["H"], dtype=dtype, device=device).requires_grad_()
    weight = (torch.randn(s["V"], s["H"], dtype=dtype, device=device) * s["H"] ** -0.5).requires_grad_()
    x0, masked, loss_weight = _targets(s, device)
    return LinearLossInputs(hidden, weight, x0, masked, loss_weight, int(masked[:, 1:].sum()))


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients: a whole training step of the op."""
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _run_logits_loss(i: LogitsLossInputs) -> tuple[Tensor, ...]:
    loss, _ = shifted_cross_entropy(i.logits, i.x0, i.masked, loss_weight=i.loss_weight)
    return gradients(loss, i.logits)


def _run_linear_loss(i: LinearLossInputs) -> tuple[Tensor, ...]:
    loss, _ = linear_shifted_cross_entropy(
        i.hidden, i.weight, i.x0, i.masked, loss_weight=i.loss_weight, max_scored=i.n_scored
    )
    return gradients(loss, i.hidden, i.weight)


def _run_log_probs(i: LinearLossInputs) -> Tensor:
    return token_log_probs(i.hidden, i.weight, i.x0, i.masked)


def _gemm(i: LinearLossInputs, products: int) -> int:
    return 2 * products * i.n_scored * i.weight.numel()


# --- sampling --------------------------------------------------------------------------------------------------------


class LogitsInputs(NamedTuple):
    """Of token_stats."""

    logits: Tensor  # [N, V]
    temperature: float
    top_k: int | None
    top_p: float
    keys: Keys


def _stats_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> LogitsInputs:
    logits = torch.randn(s["N"], s["V"], dtype=dtype, device=device) * 4
    return LogitsInputs(logits, s["temperature"], int(s["top_k"]) or None, s["top_p"], _keys(s["N"], device))


def _run_stats(i: LogitsInputs) -> tuple[Tensor, ...]:
    return token_stats(
        i.logits,
        temperature=i.temperature,
        top_k=i.top_k,
        top_p=i.top_p,
        seed=i.keys.seed,
        step=i.keys.step,
        row_index=i.keys.numbers,
    )


class UnmaskInputs(NamedTuple):
    """Of unmask."""

    xt: Tensor  # [B, L] int64
    masked: Tensor  # [B, L] bool
    token: Tensor  # [B, L] int64
    confidence: Tensor  # [B, L] float32
    amount: Tensor  # [B] float32
    rule: str
    keys: Keys


def _unmask_inputs(s: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> UnmaskInputs:
    size = (s["B"], s["L"])
    token, xt = (torch.randint(0, 32000, size, device=device) for _ in range(2))
    masked, confidence = torch.rand(size, device=device) < 0.5, torch.rand(size, device=device)
    amount = torch.full(size[:1], float(s["amount"]), device=device)
    return UnmaskInputs(xt, masked, token, confidence, amount, s["rule"], _keys(s["B"], device))


def _run_unmask(i: UnmaskInputs) -> tuple[Tensor, ...]:
    seed, step, numbers = i.keys
    arguments = (i.xt, i.masked, i.token, i.confidence, i.amount)
    return unmask(*arguments, rule=i.rule, seed=seed, step=step, sample_index=numbers)


def _sizes(letters: str, tensor: Tensor) -> dict[str, int]:
    return dict(zip(letters, tensor.shape, strict=True))


_ATTENTION: dict[str, Size] = {"B": 4, "H": 32, "Hkv": 32, "L": 2048, "D": 128, "mask": "annealed", "ratio": 0.5}
_ATTENTION_SMALL: dict[str, Size] = {"B": 1, "H": 2, "Hkv": 2, "L": 128, "D": 64}
_LINEAR: dict[str, Size] = {"B": 8, "L": 2048, "H": 4096, "V": 32000, "p": 0.5}
_LINEAR_SMALL: dict[str, Size] = {"B": 2, "L": 64, "H": 64, "V": 1000}

CASES: Mapping[str, Case] = {
    case.op: case
    for case in (
        Case(
            "mask_tokens",
            {"B": 64, "L": 2048},
            {"B": 8},
            _noising_inputs,
            _run_noising,
            plan=lambda i: _sizes("BL", i.x0),
            takes_floats=False,
        ),
        Case(
            "annealed_mask",
            {"L": 2048, "ratio": 0.3},
            {"L": 256},
            _mask_inputs,
            _run_mask,
            plan=lambda i: {"L": i.length},
            takes_floats=False,
        ),
        Case(
            "attention",
            _ATTENTION,
            _ATTENTION_SMALL,
            attention_inputs,
            run_attention,
            flops=attention_flops,
            plan=attention_sizes,
        ),
        Case(
            "attention_backward",
            _ATTENTION,
            _ATTENTION_SMALL,
            backward_inputs,
            run_attention_backward,
            flops=lambda i: attention_flops(i) * 5 // 2,
            plan=attention_sizes,
        ),
        Case(
            "shifted_cross_entropy",
            {"B": 2, "L": 2048, "V": 32000, "p": 0.5},
            {"L": 64, "V": 1000},
            _logits_inputs,
            _run_logits_loss,
        ),
        Case(
            "linear_shifted_cross_entropy",
            _LINEAR,
            _LINEAR_SMALL,
            _linear_inputs,
            _run_linear_loss,
            flops=lambda i: _gemm(i, 3),
            plan=lambda i: {"N": i.n_scored, **_sizes("VH", i.weight)},
        ),
        Case(
            "token_log_probs",
            _LINEAR,
            _LINEAR_SMALL,
            _linear_inputs,
            _run_log_probs,
            flops=lambda i: _gemm(i, 1),
        ),
        Case(
            "token_stats",
            {"N": 4096, "V": 32000, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            {"N": 64, "V": 2048},
            _stats_inputs,
            _run_stats,
            plan=lambda i: {
                **_sizes("NV", i.logits),
                "greedy": i.temperature == 0,
                "truncated": i.top_k is not None or i.top_p < 1,
            },
        ),
        Case(
            "unmask",
            {"B": 64, "L": 2048, "rule": "quota", "amount": 32.0},
            {"B": 8, "L": 256},
            _unmask_inputs,
            _run_unmask,
            plan=lambda i: _sizes("BL", i.xt),
            takes_floats=False,
        ),
    )
}
