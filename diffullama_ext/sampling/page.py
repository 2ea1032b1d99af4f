# SPDX-License-Identifier: Apache-2.0
"""A recorded run as one HTML page that needs nothing else: template in page.html, the run as JSON inside it."""

from __future__ import annotations

import html
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_tensor
from ..output_folder import write_file_at_once
from .token_text import TokenText
from .trace import ABSENT, History, Trace

_PLACE = re.compile("{{(TITLE|DATA)}}")


def trace_page(
    trace: Trace,
    text_of: TokenText,
    *,
    title: str = "Unmasking",
    lengths: Tensor | None = None,
    max_entries: int = 100_000,
) -> str:
    """A page with a slider over the steps, tokens coloured by step, confidence or entropy, and their candidates.

    It loads nothing, and forbids itself to. Tokens are data: no text of theirs can end the script or become markup.

    Args:
        trace: of a finished run.
        text_of: id -> text, see :func:`diffullama_ext.sampling.token_text`.
        lengths: int64 [B], tokens of each row that are shown; the rest is padding. None shows all.
        max_entries: bound on the page's size, in statistics of one position at one step (about 100 bytes each); steps
            are shown together until it holds.

    Raises:
        ValueError: nothing was recorded.
    """
    check_int("max_entries", max_entries, 1, 2**31 - 1)
    history = trace.history()
    batch, length = trace.maskable.shape
    if lengths is None:
        lengths = torch.full((batch,), length)
    check_tensor("lengths", lengths, torch.int64, (batch,))
    while len(history.step) > 2 and int((history.token != ABSENT).sum()) > max_entries:
        history = trace.history((len(history.step) + 1) // 2)
    vocabulary = _Vocabulary(text_of)
    rows = [_row(trace, history, row, int(n), vocabulary) for row, n in enumerate(lengths.tolist())]
    data = {"steps": trace.steps, "rows": rows, "vocabulary": vocabulary.texts}
    return _fill_template(title, data)


def write_page(path: str | os.PathLike[str], trace: Trace, text_of: TokenText, **options: Any) -> None:
    """Write :func:`trace_page` (same options) to a file, or leave what is there as it is where that fails."""
    write_file_at_once(Path(path), trace_page(trace, text_of, **options))


class _Vocabulary:
    """Texts of the tokens on the page, numbered as they come; -1 stays -1."""

    def __init__(self, text_of: TokenText) -> None:
        self.texts: list[str] = []
        self._text_of, self._number = text_of, {ABSENT: ABSENT}

    def __call__(self, token: int) -> int:
        if token not in self._number:
            self._number[token] = len(self.texts)
            self.texts.append(self._text_of(token))
        return self._number[token]


def _row(trace: Trace, history: History, row: int, length: int, number: _Vocabulary) -> dict[str, Any]:
    """One sequence: its given tokens, and for every frame what changed and what the model thought."""
    maskable = trace.maskable[row, :length]
    given = torch.where(maskable, ABSENT, history.xt[0, row, :length])
    masked, frames = maskable, []
    for t, step in enumerate(history.step.tolist()):
        frame = History(history.step[t], *(value[t, row, :length] for value in history[1:]))
        written = maskable & ~frame.masked & (masked | frame.committed)
        scored = (frame.token != ABSENT) & (masked | frame.masked | frame.committed)
        at = scored.nonzero().squeeze(1)
        frames.append(
            {
                "step": step + 1,
                "written": [[p, number(int(frame.xt[p]))] for p in written.nonzero().squeeze(1).tolist()],
                "masked": (frame.masked & (~masked | frame.remasked)).nonzero().squeeze(1).tolist(),
                "scored": at.tolist(),
                "token": [number(token) for token in frame.token[at].tolist()],
                "prob": _rounded(frame.prob[at]),
                "entropy": _rounded(frame.entropy[at]),
                "candidates": [[number(token) for token in tokens] for tokens in frame.candidates[at].tolist()],
                "candidateProbs": [_rounded(probs) for probs in frame.candidate_probs[at]],
            }
        )
        masked = frame.masked
    return {"given": [number(token) for token in given.tolist()], "frames": frames}


def _rounded(values: Tensor) -> list[float | None]:
    """Four digits, NaN as None (JSON has none)."""
    return [None if value != value else round(value, 4) for value in values.tolist()]


def _fill_template(title: str, data: dict[str, Any]) -> str:
    # Inside <script>, "<" is what could end it or begin a comment; in JSON it may stand as an escape.
    values = {
        "TITLE": html.escape(title),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return _PLACE.sub(lambda match: values[match.group(1)], template)
