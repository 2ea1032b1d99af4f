# SPDX-License-Identifier: Apache-2.0
"""Whose fault a failure is: the exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OK = 0
FAILED = 1  # the run itself went wrong
BAD_INPUT = 2  # usage, paths, data, models: what the user gave
INTERRUPTED = 130


class BadInput(Exception):
    """Something that the user gave cannot be used; the message is one line for them."""


@contextmanager
def checking_input() -> Iterator[None]:
    """Inside, what the library raises about its arguments is about the user's."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(str(error)) from error


def one_line(error: BaseException) -> str:
    """The message on one line; an exception without one is named."""
    return " ".join(str(error).split()) or type(error).__name__
