# SPDX-License-Identifier: Apache-2.0
"""`diffullama sample` and `diffullama infill`: text from an adapted model."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Report, reporting
from .errors import checking_input
from .models import load_adapted

if TYPE_CHECKING:
    from ..sampling import Policy, StepHook

ModelOption = Annotated[str, typer.Option("--model", help="Adapted model: a folder (or demo run), or a Hub id.")]
PolicyOption = Annotated[str, typer.Option(help="random, confidence or threshold.")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Forwards; by default one a token.")]
ThresholdOption = Annotated[float | None, typer.Option(help="Of the policy threshold; by default 0.9.")]
BlockOption = Annotated[int | None, typer.Option(min=1, help="Fill block by block, left to right.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Draw among the k most likely.")]
TopPOption = Annotated[float, typer.Option(help="Draw among the most likely of this total probability.")]
CountOption = Annotated[int, typer.Option("-n", "--count", min=1, help="Texts.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Same seed, same text.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help='A line {"text": ..., "nfe": ...} for each text.')]

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as a line end, a tab and a backslash; any other backslash stays."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match.group(1)], text)


def _policy(name: str, threshold: float | None) -> Policy:
    from ..sampling import make_policy

    return make_policy(name, **({} if threshold is None else {"threshold": threshold}))


def _step_hook(report: Report, total: int) -> StepHook:
    def on_step(state: Any, stats: object, decision: object) -> None:
        through = not state.masked.any()
        report("sample", total if through else min(state.step + 1, total), total, "")

    return on_step


def _print_texts(texts: list[str], nfe: list[int], as_json: bool) -> None:
    for index, (text, count) in enumerate(zip(texts, nfe, strict=True), start=1):
        if as_json:
            typer.echo(json.dumps({"text": text, "nfe": count}))
            continue
        if len(texts) > 1:
            typer.echo(f"--- {index}")
        typer.echo(text)


def sample(
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="Text to continue; \\n, \\t and \\\\ are escapes.")] = "",
    length: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 32,
    policy: PolicyOption = "confidence",
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    block_length: BlockOption = None,
    temperature: TemperatureOption = 0.9,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.9,
    count: CountOption = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write text, from nothing or behind a prompt."""
    import torch

    loaded, tokenizer = load_adapted(model, device)
    from ..sampling import generate

    ids = tokenizer(unescaped(prompt))["input_ids"] if prompt else []
    with reporting() as report, checking_input():
        out = generate(
            loaded,
            length=length,
            prompt_ids=torch.tensor([ids]) if ids else None,
            n=count,
            steps=steps,
            policy=_policy(policy, threshold),
            block_length=block_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_step=_step_hook(report, steps or length),
        )
    _print_texts(tokenizer.batch_decode(out.sequences, skip_special_tokens=True), out.nfe.tolist(), as_json)


def infill(
    model: ModelOption,
    text: Annotated[str, typer.Option(help="Text with [MASK:n] for n tokens; \\n, \\t and \\\\ are escapes.")],
    escapes: Annotated[bool, typer.Option(help="Read the escapes in --text.")] = True,
    policy: PolicyOption = "confidence",
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    block_length: BlockOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    count: CountOption = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fill the spans [MASK:n] of a text from what is on both sides of them.

    Example: diffullama infill --model runs/demo --text "def add(a, b):\\n    [MASK:12]\\n"
    """
    from ..sampling import infill as infill_text
    from ..sampling import parse_spans

    text = unescaped(text) if escapes else text
    with checking_input():
        total = sum(piece for piece in parse_spans(text) if isinstance(piece, int))
    loaded, tokenizer = load_adapted(model, device)
    with reporting() as report, checking_input():
        out = infill_text(
            loaded,
            tokenizer,
            text,
            n=count,
            steps=steps,
            policy=_policy(policy, threshold),
            block_length=block_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_step=_step_hook(report, min(steps or total, total)),
        )
    _print_texts(out.texts, out.nfe.tolist(), as_json)
