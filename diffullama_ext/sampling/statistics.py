# SPDX-License-Identifier: Apache-2.0
"""From logits of positions to their statistics: the random keys, and where each row belongs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_range
from ..functional import TokenStats, token_stats
from .state import Scored, State, check_count


@dataclass(frozen=True)
class PositionStats:
    """Draws a token at every position asked for, with the statistics of its distribution.

    Attributes:
        temperature, top_k, top_p: of the draw, see :func:`diffullama_ext.token_stats`.
    """

    temperature: float
    top_k: int | None
    top_p: float

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, math.inf)
        check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        if self.top_k is not None:
            check_count("top_k", self.top_k)

    def __call__(self, scored: Scored, rows: Tensor, state: State) -> TokenStats:
        """Statistics of the positions ``rows`` (bool [B, L]), each field [B, L]; token -1 and NaN elsewhere.

        ``scored`` stays in the state, for policies and traces that want whole distributions.
        """
        state.scored = scored
        batch, length = rows.shape
        # The key of a draw is (sample, position): the same in any batch and behind any padding.
        key = (state.sample_index[:, None] << 32) + torch.arange(length, device=rows.device)
        current = state.xt.flatten()
        stats = self._draw(scored.logits, key.flatten()[scored.at], current[scored.at], state)
        token = torch.full_like(current, -1).index_copy(0, scored.at, stats.token)
        values = torch.stack(stats[1:])
        values = values.new_full((len(values), batch * length), torch.nan).index_copy(1, scored.at, values)
        asked = rows.flatten()
        token, values = torch.where(asked, token, -1), torch.where(asked, values, torch.nan)
        return TokenStats(token.view(batch, length), *values.view(-1, batch, length))

    def _draw(self, logits: Tensor, row_index: Tensor, current: Tensor, state: State) -> TokenStats:
        stats = token_stats(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            forbid=state.mask_id if state.mask_id < logits.shape[1] else None,
            seed=state.seed,
            step=state.step,
            row_index=row_index,
            current=current,
        )
        # A greedy draw is certain: its confidence is the model's, as in DiffuLLaMA and Dream at temperature 0.
        return stats._replace(sample_prob=stats.prob) if self.temperature == 0 else stats
