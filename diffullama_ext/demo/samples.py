# SPDX-License-Identifier: Apache-2.0
"""Texts from the demo's model: whole ones, and lines of held-out sources filled in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ..data import Document
from ..sampling import generate, infill
from .config import DemoConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASKED_TOKENS = range(4, 13)  # tokens of a line that is worth filling in
TEMPERATURE = 0.9
TOP_P = 0.9


@dataclass(frozen=True)
class Infilled:
    """A held-out snippet with one line masked behind its indentation."""

    document: str
    prompt: str  # with [MASK:n] in the line's place
    truth: str  # the line
    filled: str  # what the model wrote for it


def sample_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DemoConfig) -> list[str]:
    """``config.samples`` texts as long as the model takes."""
    out = generate(
        model,
        length=config.length - 1,  # the start token takes a place
        n=config.samples,
        steps=config.sample_steps,
        policy="confidence",
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=config.seed,
    )
    return tokenizer.batch_decode(out.sequences, skip_special_tokens=True)


def infill_heldout(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], config: DemoConfig
) -> list[Infilled]:
    """Up to ``config.samples`` lines of held-out sources, each token the most likely one when it is written."""
    snippets = list(islice(_snippets(tokenizer, documents, config), config.samples))
    if not snippets:
        return []
    prompts = [prompt for _, prompt, _ in snippets]
    out = infill(
        model, tokenizer, prompts, steps=config.sample_steps, policy="confidence", temperature=0.0, seed=config.seed
    )
    return [Infilled(*snippet, fill) for snippet, (fill,) in zip(snippets, out.fills, strict=True)]


def _snippets(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], config: DemoConfig
) -> Iterator[tuple[str, str, str]]:
    """(document, prompt, truth), at most one a document: lines that fit the model, one of them masked."""
    chosen = random.Random(config.seed)
    sources = [document for document in documents if document.name.startswith("lib/")]
    chosen.shuffle(sources)
    for document in sources:
        lines = document.text.splitlines(keepends=True)
        sizes = [len(row) for row in tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]]
        for place in chosen.sample(range(len(lines)), len(lines)):
            truth = lines[place].strip()
            n_tokens = len(tokenizer(truth, add_special_tokens=False)["input_ids"])
            first, last = _window(sizes, place, config.length - 2)
            if n_tokens in MASKED_TOKENS and first < place < last:
                masked = lines[place].replace(truth, f"[MASK:{n_tokens}]")
                yield document.name, "".join([*lines[first:place], masked, *lines[place + 1 : last + 1]]), truth
                break


def _window(sizes: list[int], place: int, room: int) -> tuple[int, int]:
    """First and last line of a window of at most ``room`` tokens around ``place``, grown by turns above and below."""
    first = last = place
    room -= sizes[place]
    above = below = True
    while above or below:
        above = above and first > 0 and sizes[first - 1] <= room
        if above:
            first -= 1
            room -= sizes[first]
        below = below and last + 1 < len(sizes) and sizes[last + 1] <= room
        if below:
            last += 1
            room -= sizes[last]
    return first, last
