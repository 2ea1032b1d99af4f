# SPDX-License-Identifier: Apache-2.0
"""Keys and values kept between the steps of a block, so that a step computes the block and not the sequence.

=========== ======= ========================================================================== =====================
cache       exact   a step computes                                                            after a new block began
=========== ======= ========================================================================== =====================
"prefix"    no      the block and all behind it; what is before keeps the keys it had then     everything, once
"dual"      no      the block; what is before and behind keeps the keys it had then            everything, once
"block"     yes     the block; nothing sees a later block, so what is before cannot change     the last block again,
                                                                                               with the new one
=========== ======= ========================================================================== =====================

"prefix" and "dual" are Fast-dLLM's (Wu et al. 2025), for models with bidirectional attention. "block" is of models
trained with block-causal attention: BD3-LM (Arriola et al. 2025), SDAR, BARD. With the shift, row j - 1 scores position
j: a block [s, e) needs the logits rows s - 1..e - 2, and the keys of s..e - 1, so s - 1..e - 1 are computed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention_mask import AttentionMask
from ..checks import check_choice
from .denoisers import ModelDenoiser, mask_and_shift
from .state import Scored, State

CACHES = ("prefix", "dual", "block")


class _PositionLayer(CacheLayerMixin):
    """Keys and values [B, Hkv, L, D] of one layer by position, of which a forward replaces a window.

    Attributes:
        sequences: int64 [M], rows of the batch that the forward is of; positions: int64 [M, W], of each, its window.
    """

    def __init__(self, batch: int, length: int) -> None:
        super().__init__()
        self.batch, self.length = batch, length
        self.sequences = self.positions = torch.empty(0, dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Zeros: a key that was never computed is never attended to, but 0 * weight must not be NaN."""
        heads, width = key_states.shape[1], key_states.shape[3]
        self.keys = key_states.new_zeros(self.batch, heads, self.length, width)
        self.values = value_states.new_zeros(self.batch, heads, self.length, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the window [M, Hkv, W, D]; all keys and values of those sequences, [M, Hkv, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = (self.sequences[:, None], slice(None), self.positions)  # [M, W, Hkv, D] of a tensor [B, Hkv, L, D]
        assert self.keys is not None
        assert self.values is not None
        self.keys[where] = key_states.transpose(1, 2)
        self.values[where] = value_states.transpose(1, 2)
        return self.keys[self.sequences], self.values[self.sequences]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All positions are keys, from position 0."""
        return self.length, 0

    def get_seq_length(self) -> int:
        """Of transformers' counting of what was cached before: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """Of the sequences."""
        return self.length

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length in older versions of transformers."""
        return self.length


class _PositionCache(Cache):
    """The layers of a model."""

    def __init__(self, n_layers: int, batch: int, length: int) -> None:
        self.by_position = [_PositionLayer(batch, length) for _ in range(n_layers)]
        super().__init__(layers=list(self.by_position))

    def use(self, sequences: Tensor, positions: Tensor) -> None:
        """What the next forward is of: int64 [M], [M, W]."""
        for layer in self.by_position:
            layer.sequences, layer.positions = sequences, positions


def _cache_argument(model: nn.Module) -> str:
    """What the forward inside any wrapper calls its cache: "cache" in newer versions of transformers."""
    for module in model.modules():
        taken = inspect.signature(module.forward).parameters
        for name in ("cache", "past_key_values"):
            if name in taken:
                return name
    return "past_key_values"


class CacheDrift(NamedTuple):
    """How far the distributions under a cache are from those of full forwards, over all positions that were read."""

    total_variation: float  # mean of 1/2 sum |p - q|
    max_total_variation: float
    argmax_changed: float  # share of positions whose most likely token differs
    n_positions: int


@dataclass
class _Window:
    """A forward of part of the batch: sequences int64 [M], and of each the positions int64 [M, W] to compute."""

    sequences: Tensor
    start: Tensor  # [M]
    end: Tensor  # [M], one past the last; narrower windows repeat their last position

    def positions(self) -> Tensor:
        width = int((self.end - self.start).max())
        step = torch.arange(width, device=self.start.device)
        return torch.minimum(self.start[:, None] + step, self.end[:, None] - 1)


@dataclass
class CachedDenoiser:
    """A transformers model with a cache, for one call of :func:`fill`; a row enters a block when its own time comes.

    Each step looks at which rows are new in a block, which makes the host wait for a GPU. Positions behind the window
    are not scored: of policies that look further, "ahd" and "klass" go by the current block, and "prophet" stops early
    only for an answer inside it.

    Attributes:
        model: adapted; for "block" trained with block-causal attention over the same blocks.
        attention_mask: bool [B, L], False for padding; None without.
        kind: "prefix", "dual" or "block".
        measure: also run each forward in full, for :meth:`drift`. Nothing else changes but the time.
    """

    model: nn.Module
    attention_mask: Tensor | None
    kind: str
    measure: bool = False
    _cache: _PositionCache | None = field(default=None, repr=False)
    _current: Tensor | None = field(default=None, repr=False)
    _drift: list[tuple[float, float, int, int]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        check_choice("cache", self.kind, CACHES)
        self._shift = int(mask_and_shift(self.model)[1])
        self._plain = ModelDenoiser(self.model, self.attention_mask)

    def score(self, state: State, rows: Tensor) -> Scored:
        """Logits of the positions asked for in each row's window."""
        if self._cache is None:
            batch, length = state.xt.shape
            config: Any = self.model.config
            self._cache = _PositionCache(config.num_hidden_layers, batch, length)
            self._current = torch.full_like(state.current, -1)
        column_block = block_of_columns(state)
        windows = self._windows(state, column_block)
        parts = [self._forward(window, state, rows, column_block) for window in windows]
        self._current = state.current
        scored = Scored(torch.cat([p.logits for p in parts]), torch.cat([p.at for p in parts]))
        if self.measure:
            self._compare(scored, state, column_block)
        return scored

    def drift(self) -> CacheDrift | None:
        """Over all steps so far; None where nothing was measured."""
        if not self._drift:
            return None
        total, largest, changed, n = (list(column) for column in zip(*self._drift, strict=True))
        count = sum(n)
        return CacheDrift(sum(total) / count, max(largest), sum(changed) / count, count)

    def _windows(self, state: State, column_block: Tensor) -> list[_Window]:
        """Of the rows that entered a block and of those that stay in theirs; rows without masks need none."""
        length = state.xt.shape[1]
        column = torch.arange(length, device=state.xt.device)
        here = column_block == state.current[:, None]
        first = torch.where(here, column, length).amin(dim=1)
        end = torch.where(here, column, -1).amax(dim=1) + 1
        if self.kind == "prefix":
            end = torch.full_like(end, length)
        assert self._current is not None
        entered, unfinished = state.current != self._current, state.masked.any(dim=1)
        # A new block needs what it will not see again: of "block", the last block once more, now that it is clean.
        earliest = torch.zeros_like(first)
        if self.kind == "block":
            last = column_block >= self._current[:, None]
            earliest = torch.where(last, column, length).amin(dim=1)
            latest = end
        else:
            latest = torch.full_like(end, length)
        windows = []
        for chosen, start, stop in (
            (entered & unfinished, earliest, latest),
            (~entered & unfinished, (first - self._shift).clamp(min=0), end),
        ):
            index = chosen.nonzero().squeeze(1)
            if len(index):
                windows.append(_Window(index, start[index], stop[index]))
        return windows

    def _forward(self, window: _Window, state: State, rows: Tensor, column_block: Tensor) -> Scored:
        length = state.xt.shape[1]
        index, positions = window.sequences, window.positions()
        assert self._cache is not None
        self._cache.use(index, positions)
        inside = rows[index].nonzero()  # [N, 2]: which of the window's sequences, position
        scorer = inside[:, 1] - self._shift
        reached = (scorer >= window.start[inside[:, 0]]) & (scorer < window.end[inside[:, 0]])
        inside, scorer = inside[reached], scorer[reached]
        inputs: dict[str, Any] = {}
        if self.kind == "block":
            blocks = column_block[index]
            inputs["diffusion_mask"] = AttentionMask.block_causal(blocks.gather(1, positions), blocks)
        logits = self._plain.forward_rows(
            inside[:, 0] * positions.shape[1] + scorer - window.start[inside[:, 0]],
            input_ids=state.xt[index].gather(1, positions),
            position_ids=positions,
            attention_mask=None if self.attention_mask is None else self.attention_mask[index],
            use_cache=True,
            **inputs | {_cache_argument(self.model): self._cache},
        )
        return Scored(logits, index[inside[:, 0]] * length + inside[:, 1])

    def _compare(self, scored: Scored, state: State, column_block: Tensor) -> None:
        """Against a forward of everything."""
        inputs: dict[str, Any] = {}
        if self.kind == "block":
            inputs["diffusion_mask"] = AttentionMask.block_causal(column_block)
        full = self._plain.forward_rows(
            scored.at - self._shift, input_ids=state.xt, attention_mask=self.attention_mask, **inputs
        )
        p, q = scored.logits.double().softmax(dim=1), full.double().softmax(dim=1)
        distance = 0.5 * (p - q).abs().sum(dim=1)
        if len(distance):
            changed = int((p.argmax(dim=1) != q.argmax(dim=1)).sum())
            self._drift.append((float(distance.sum()), float(distance.max()), changed, len(distance)))


def block_of_columns(state: State) -> Tensor:
    """The block of every position, int64 [B, L]: of fixed text, that of the last maskable position before; -1 first."""
    return torch.where(state.maskable, state.block, -1).cummax(dim=1).values


@dataclass(frozen=True)
class BlockCausalDenoiser(ModelDenoiser):
    """The model under block-causal attention, without a cache: what the "block" cache is exact to."""

    def score(self, state: State, rows: Tensor) -> Scored:
        """Full forwards; a position sees its own block and those before."""
        at = rows.flatten().nonzero().squeeze(1)
        logits = self.forward_rows(
            at - int(mask_and_shift(self.model)[1]),
            input_ids=state.xt,
            attention_mask=self.attention_mask,
            diffusion_mask=AttentionMask.block_causal(block_of_columns(state)),
        )
        return Scored(logits, at)
