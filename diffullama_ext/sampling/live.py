# SPDX-License-Identifier: Apache-2.0
"""A run in the terminal while it happens: masks become tokens, coloured by confidence."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from ..checks import check_int
from ..functional import TokenStats
from .state import Decision, State
from .token_text import TokenText

MASK = "\N{LIGHT SHADE}"
_NEW = "reverse"
# From unsure to sure; 256-colour codes that read on dark and on light grounds.
_STYLES = ((0.5, "color(133)"), (0.8, "color(67)"), (0.95, "color(30)"), (1.1, "color(71)"))


class LiveView:
    """A step hook: ``with LiveView(token_text(tokenizer)) as view: generate(..., on_step=view)``.

    Args:
        text_of: id -> text, see :func:`diffullama_ext.sampling.token_text`.
        console: of rich; by default on stderr. Where it is no terminal, only the last state is printed.
        rows: sequences shown, the batch's first.
        interval: seconds at least between two pictures; the device is asked only for those shown.
    """

    def __init__(
        self, text_of: TokenText, *, console: Console | None = None, rows: int = 4, interval: float = 0.05
    ) -> None:
        check_int("rows", rows, 1, 2**31 - 1)
        self._text_of, self._rows, self._interval = text_of, rows, interval
        self._live = Live(console=console or Console(stderr=True), auto_refresh=False, vertical_overflow="crop")
        self._shown = 0.0
        self._last: tuple[State, Tensor] | None = None

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._last is not None:
            self._live.update(self._picture(*self._last))
        self._live.__exit__(kind, error, traceback)

    def __call__(self, state: State, stats: TokenStats, written: Decision) -> None:
        """Show a step; the arguments are the loop's."""
        if state.step == 0:
            self._confidence = torch.full_like(stats.prob, torch.nan)
        self._confidence = torch.where(written.commit, stats.prob, self._confidence)
        self._last = (state, written.commit)
        if time.monotonic() - self._shown >= self._interval:
            self._live.update(self._picture(*self._last), refresh=True)
            self._shown = time.monotonic()

    def _picture(self, state: State, new: Tensor) -> Group:
        n = self._rows
        rows = zip(*(value[:n].tolist() for value in (state.xt, state.masked, new, self._confidence)), strict=True)
        left = int(state.masked.sum())
        status = Text(f"step {state.step + 1}: {left} masked", style="dim")
        return Group(*(self._line(*row) for row in rows), status)

    def _line(self, xt: list[int], masked: list[bool], new: list[bool], confidence: list[float]) -> Text:
        line = Text()
        for token, is_masked, is_new, sure in zip(xt, masked, new, confidence, strict=True):
            if is_masked:
                line.append(MASK, style="dim")
                continue
            style = "" if sure != sure else next(name for bound, name in _STYLES if sure < bound)
            line.append(printable(self._text_of(token)), style=f"{_NEW} {style}".strip() if is_new else style)
        return line


def printable(text: str) -> str:
    """Without what would move the cursor or change the terminal: control characters show as their escapes."""
    text = text.replace("\t", "    ")
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" if ord(c) < 256 else " " for c in text)
