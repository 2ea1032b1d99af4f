# SPDX-License-Identifier: Apache-2.0
"""What a step's logits come from: any function of ids, a transformers model, and what wraps either."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..attention_mask import AttentionMask
from ..checks import FLOATS, check_range, check_tensor
from .state import Scored, State

Denoiser = Callable[[Tensor], Tensor]  # ids int64 [B, L] -> logits [B, L, V]


@runtime_checkable
class RowDenoiser(Protocol):
    """Computes logits of the positions asked for, and of no more than it must.

    One that can verify also has ``verify(state, rows)``: two Scored of one forward, the second by a model that does not
    see the token it judges. One that takes several forwards has their number as ``n_forwards``.
    """

    def score(self, state: State, rows: Tensor) -> Scored:
        """Logits of at least the positions ``rows`` (bool [B, L]) of ``state.xt``, the shift applied."""
        ...


def positions_of(rows: Tensor, state: State) -> Tensor:
    """The positions ``rows`` (bool [B, L]) as int64 [N] of b * L + j.

    Off the CPU, where counting them would make the host wait, ``state.width`` of every row: those asked for, in order,
    and others after them.
    """
    if rows.device.type == "cpu":
        return rows.flatten().nonzero().squeeze(1)
    first = rows.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : state.width]
    return (first + rows.shape[1] * torch.arange(len(rows), device=rows.device)[:, None]).flatten()


# --- any function -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FunctionDenoiser:
    """A function of ids: all logits are computed, then those asked for are read.

    Attributes:
        denoise: ids int64 [B, L] -> logits [B, L, V], any float dtype. It may have ``leave_one_out``, the same from a
            model that does not see, at each position, the token there.
        shift: position j is scored by logits row j - 1 instead of j.
    """

    denoise: Denoiser
    shift: bool

    def score(self, state: State, rows: Tensor) -> Scored:
        """The rows asked for; off the CPU all, which costs less than to wait for their number."""
        return self._rows(self.denoise, "denoise(xt)", state, rows)

    def verify(self, state: State, rows: Tensor) -> tuple[Scored, Scored]:
        """Two calls; ValueError where the function has no ``leave_one_out``."""
        leave_one_out = getattr(self.denoise, "leave_one_out", None)
        if leave_one_out is None:
            name = getattr(self.denoise, "__name__", type(self.denoise).__name__)
            raise ValueError(f"a policy that verifies needs a denoiser with leave_one_out(xt), got {name}")
        return self.score(state, rows), self._rows(leave_one_out, "leave_one_out(xt)", state, rows)

    def _rows(self, denoise: Denoiser, name: str, state: State, rows: Tensor) -> Scored:
        xt, shift = state.xt, int(self.shift)
        logits = denoise(xt)
        check_tensor(name, logits, FLOATS, (*xt.shape, "V"), xt.device)
        flat = logits.reshape(-1, logits.shape[-1])
        if xt.device.type == "cpu":
            at = positions_of(rows, state)
            return Scored(flat[at - shift], at)
        # With a shift the last logits row of a sample meets the next one's position 0, which is never asked for.
        return Scored(flat, torch.arange(len(flat), device=flat.device).roll(-shift))


def as_row_denoiser(denoise: Denoiser | RowDenoiser, shift: bool) -> RowDenoiser:
    """A RowDenoiser as it is, a function wrapped."""
    return denoise if isinstance(denoise, RowDenoiser) else FunctionDenoiser(denoise, shift)


# --- transformers models ----------------------------------------------------------------------------------------------


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


def _head(model: Any) -> nn.Module | None:
    """The output embeddings; None without, or where the model is compiled, whose graph may not see a hook on them."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return None
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@contextmanager
def _reads(head: nn.Module, index: Tensor) -> Iterator[None]:
    """Inside, the head sees only rows ``index`` [N] of the hidden states [B, L, D]: logits [1, N, V]."""

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[index][None],)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class ModelDenoiser:
    """A transformers model with bidirectional attention as ``ids [B, L] -> logits [B, L, V]``, or row by row.

    Attributes:
        model: called as ``model(input_ids=..., attention_mask=..., use_cache=False).logits``; :meth:`score` needs it
            adapted. It may be compiled, or its trunk, which lets the head read only the rows asked for.
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

    def forward_rows(self, index: Tensor, **inputs: Any) -> Tensor:
        """Logits [N, V] of rows ``index`` [N] (b * Lq + i) of a forward of ids [B, Lq]: no other row of the head."""
        ids: Tensor = inputs["input_ids"]
        inputs = {"use_cache": False, **inputs}
        head = _head(self.model)
        if head is None:
            logits = self.model(**inputs).logits.flatten(0, 1)[index]
        else:
            with _reads(head, index):
                logits = self.model(**inputs).logits[0]
        return logits.to(ids.device)

    def score(self, state: State, rows: Tensor) -> Scored:
        """Only the rows asked for go through the head."""
        at = positions_of(rows, state)
        index = at - int(mask_and_shift(self.model)[1])
        return Scored(self.forward_rows(index, input_ids=state.xt, attention_mask=self.attention_mask), at)

    def verify(self, state: State, rows: Tensor) -> tuple[Scored, Scored]:
        """One forward of [xt, shadow]: shadow row i sees all of xt but the token that it scores, and nothing sees it.

        Without a shift the shadow's input is the mask, as in WINO. With it, row j - 1 scores position j: the shadow
        has the token of j - 1 and may not see j. The hidden states that it attends to have seen the token, as there.
        """
        mask_id, shift = mask_and_shift(self.model)
        batch, length = state.xt.shape
        device = state.xt.device
        column = torch.arange(length, device=device)
        eye = column[:, None] == column
        sees = torch.ones(2 * length, 2 * length, dtype=torch.bool, device=device)
        sees[:length, length:] = False
        sees[length:, length:] = eye  # itself
        sees[length:, :length] = ~(column[:, None] + int(shift) == column)
        shadow = state.xt if shift else torch.full_like(state.xt, mask_id)
        real = self.attention_mask
        at = positions_of(rows, state)
        row = at + (at // length) * length - int(shift)  # in [B * 2L]
        logits = self.forward_rows(
            torch.cat((row, row + length)),
            input_ids=torch.cat((state.xt, shadow), dim=1),
            attention_mask=None if real is None else torch.cat((real, real), dim=1),
            position_ids=column.repeat(2).expand(batch, -1),
            diffusion_mask=AttentionMask.from_dense(sees),
        )
        return Scored(logits[: len(at)], at), Scored(logits[len(at) :], at)


# --- guidance ---------------------------------------------------------------------------------------------------------


def without_context(state: State) -> Tensor:
    """The ids with everything fixed masked: the negative branch of classifier-free guidance (LLaDA)."""
    return torch.where(state.maskable, state.xt, state.mask_id)


@dataclass(frozen=True)
class Guided:
    """logits = negative + (1 + weight) (logits - negative): away from what the model says of other ids.

    Attributes:
        denoise: of both branches.
        weight: 0 is the model itself; at least 0.
        negative: the other branch's ids int64 [B, L], from the state; by default without the context, which is
            classifier-free guidance. Tokens that shall count for more are masked in it.
        negative_denoise: of the other branch, where it must not share a cache; None is ``denoise``.

    Source: LLaDA (Nie et al. 2025), unsupervised classifier-free guidance, after Nie et al. (2024).
    """

    denoise: RowDenoiser
    weight: float
    negative: Callable[[State], Tensor] = without_context
    negative_denoise: RowDenoiser | None = None
    n_forwards: int = 2

    def __post_init__(self) -> None:
        check_range("weight", self.weight, 0.0, math.inf)

    def score(self, state: State, rows: Tensor) -> Scored:
        """Two forwards; where the model allows no token (-inf) guidance does not either."""
        other = self.negative(state)
        check_tensor("negative(state)", other, torch.int64, tuple(state.xt.shape), state.xt.device)
        logits, at = self.denoise.score(state, rows)
        negative = (self.negative_denoise or self.denoise).score(replace(state, xt=other), rows).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, negative = logits.to(wide), negative.to(wide)
        guided = negative + (1.0 + self.weight) * (logits - negative)
        return Scored(torch.where(logits == -torch.inf, logits, guided), at)
