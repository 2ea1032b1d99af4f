# SPDX-License-Identifier: Apache-2.0
"""Single tokens as text to show: what a tokenizer only decodes within a sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

TokenText = Callable[[int], str]  # id -> text

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark of a space
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


def token_text(tokenizer: Any) -> TokenText:
    """Text of single ids: with the space before a SentencePiece token, bytes that are no text by the token's name."""

    @cache
    def text_of(token_id: int) -> str:
        name = tokenizer.convert_ids_to_tokens(token_id)
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if name is None:  # an id of the model's that the tokenizer lacks
            return f"<{token_id}>"
        if not text or _UNDECODABLE in text:
            return str(name)
        return " " + text if name.startswith(_SPACE) and not text.startswith(" ") else text

    return text_of
