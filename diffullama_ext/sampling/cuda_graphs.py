# SPDX-License-Identifier: Apache-2.0
"""The forward of a step as a CUDA graph: its shapes are the same in every step, so it is launched as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .denoisers import ModelDenoiser, mask_and_shift, positions_of
from .state import Scored, State


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of ``run``, as (what replays it, the tensor that a replay writes); run twice before, to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


@dataclass
class GraphedDenoiser:
    """A model whose forward is captured at its first step and replayed in the others, for one call of :func:`fill`.

    The logits of a step are overwritten by the next: copy ``state.scored`` to keep it. Rows of the head are as many as
    in the first step.

    Attributes:
        plain: the model on a CUDA device, and the padding. Nothing in its forward may wait for the host.
    """

    plain: ModelDenoiser
    capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]] = capture
    _ids: Tensor | None = field(default=None, repr=False)
    _index: Tensor | None = field(default=None, repr=False)
    _logits: Tensor | None = field(default=None, repr=False)
    _replay: Callable[[], None] | None = field(default=None, repr=False)

    def score(self, state: State, rows: Tensor) -> Scored:
        """Write the ids and the rows of the head into the graph's inputs, and replay it."""
        at = positions_of(rows, state)
        index = (at - int(mask_and_shift(self.plain.model)[1])).clamp(min=0)
        if self._replay is None:
            ids, static_index = state.xt.clone(), index.clone()
            self._ids, self._index = ids, static_index
            self._replay, self._logits = self.capture(
                lambda: self.plain.forward_rows(static_index, input_ids=ids, attention_mask=self.plain.attention_mask)
            )
        assert self._ids is not None
        assert self._index is not None
        assert self._logits is not None
        self._ids.copy_(state.xt)
        self._index[: len(index)].copy_(index)
        self._replay()
        return Scored(self._logits[: len(at)], at)
