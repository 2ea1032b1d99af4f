# SPDX-License-Identifier: Apache-2.0
"""The view in the terminal: every step on a terminal, the end elsewhere, and no token moves the cursor."""

import io
import re

import pytest
import torch
from rich.console import Console

from diffullama_ext.sampling import fill
from diffullama_ext.sampling.live import MASK, LiveView, printable

WORDS = ["[red]", "\x1b[2J", "c", "d", "\u202e", "f", "g", "h", "?"]
MASK_ID = 8


def view(context_denoiser, *, terminal, rows=4, interval=0.0):
    """(what was written, final ids) of a run of 5 steps over 3 rows."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system="256" if terminal else None)
    xt = torch.randint(0, MASK_ID, (3, 11))
    xt[:, :2] = torch.tensor([0, 1])
    masked = (torch.arange(11) > 2).expand(3, 11)
    with LiveView(WORDS.__getitem__, console=console, rows=rows, interval=interval) as hook:
        filled = fill(context_denoiser(9), xt, masked, mask_id=MASK_ID, steps=5, on_step=hook)
    return console.file.getvalue(), filled.xt.tolist()


def without_styles(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def expected(ids):
    return "".join(WORDS[i] for i in ids).replace("\x1b", r"\x1b").replace("\u202e", " ")


def test_every_step_is_shown_on_a_terminal(context_denoiser):
    written, final = view(context_denoiser, terminal=True)
    counts = [int(n) for n in re.findall(r"(\d+) masked", written)]
    assert [n for i, n in enumerate(counts) if i == 0 or n != counts[i - 1]] == [18, 12, 6, 3, 0]
    end = without_styles(written).split("step 5: 0 masked")[-2].replace("\r", "").splitlines()
    assert [expected(row) for row in final] == end[-3:]
    assert MASK in written
    assert "\x1b[2J" not in written


def test_elsewhere_the_end_is_printed_once(context_denoiser):
    written, final = view(context_denoiser, terminal=False, rows=2)
    assert written.splitlines() == [*(expected(row) for row in final[:2]), "step 5: 0 masked"]


def test_pictures_have_an_interval_but_the_end_is_always_shown(context_denoiser):
    written, _ = view(context_denoiser, terminal=True, interval=1e9)
    assert set(re.findall(r"\d+ masked", written)) <= {"18 masked", "0 masked"}
    assert "0 masked" in written


def test_text_that_moves_nothing():
    assert printable("a\tb\n\r\x00é\u2028") == "a    b\n\\x0d\\x00é "


def test_bad_arguments():
    with pytest.raises(ValueError, match="rows must be in"):
        LiveView(str, rows=0)
