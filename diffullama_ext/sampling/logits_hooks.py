# SPDX-License-Identifier: Apache-2.0
"""What may change the logits of a step before tokens are drawn: constraints and penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_tensor
from .state import Scored, State

LogitsHook = Callable[[Scored, State], Tensor]  # -> logits [N, V] of the same rows; what was given stays as it was


@dataclass(frozen=True)
class Forced:
    """Certain positions can only become certain tokens, whenever they are drawn; until then they are masks.

    (What is known from the start is better given as fixed text, which the model sees from the first step.)

    Attributes:
        tokens: int64 [B, L], the token of a position; -1 where it is free. Columns as in ``state.xt``.
    """

    tokens: Tensor

    def __call__(self, scored: Scored, state: State) -> Tensor:
        """All logits of a forced position are -inf but its token's, which is 0."""
        check_tensor("tokens", self.tokens, torch.int64, tuple(state.xt.shape), state.xt.device)
        token = self.tokens.flatten()[scored.at][:, None]  # [N, 1]
        only = torch.full_like(scored.logits, -torch.inf).scatter(1, token.clamp(min=0), 0.0)
        return torch.where(token >= 0, only, scored.logits)


@dataclass(frozen=True)
class Forbidden:
    """Tokens that are never drawn: the end of text, to fill a given length (an option of LLaDA), special tokens.

    Attributes:
        ids: any number of them.
    """

    ids: Sequence[int]

    def __call__(self, scored: Scored, state: State) -> Tensor:
        """Their logits are -inf."""
        index = torch.tensor(list(self.ids), dtype=torch.int64, device=scored.logits.device)
        return scored.logits.index_fill(1, index, -torch.inf)
