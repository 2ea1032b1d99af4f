# SPDX-License-Identifier: Apache-2.0
"""`diffullama sample` and `diffullama infill`: text from an adapted model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import checking_input
from .jsonl import Record
from .models import load_adapted
from .sampling_run import Files, Sampling, Shown, run_batches, run_one

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampling import StepHook

ModelOption = Annotated[str, typer.Option("--model", help="Adapted model: a folder (or demo run), or a Hub id.")]
PolicyOption = Annotated[str, typer.Option(metavar="NAME[:FIELD=VALUE,...]", help="What to commit; listed below.")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Forwards; by default one a token.")]
BlockOption = Annotated[int | None, typer.Option(min=1, help="Fill block by block, left to right.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Draw among the k most likely.")]
TopPOption = Annotated[float, typer.Option(help="Draw among the most likely of this total probability.")]
CfgOption = Annotated[float, typer.Option(min=0.0, help="Weight of classifier-free guidance.")]
CacheOption = Annotated[
    str | None, typer.Option(help="prefix or dual (approximate), or block (models with block-causal attention).")
]
CountOption = Annotated[int, typer.Option("-n", "--n", min=1, help="Texts for each input.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Same seed, same text.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
JsonOption = Annotated[bool, typer.Option("--json", help='A line {"text": ..., "nfe": ...} for each text.')]
HtmlOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the run as a page to look through.")]
LiveOption = Annotated[bool, typer.Option("--live", help="Show the text in the terminal while it is written.")]
InOption = Annotated[Path | None, typer.Option("--in", metavar="FILE.jsonl", help="Inputs, one JSON object a line.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE.jsonl", help="Results of --in; the same command again resumes.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Inputs of --in in a forward.")]

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as a line end, a tab and a backslash; any other backslash stays."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match.group(1)], text)


def sample(
    model: ModelOption,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; \\n, \\t and \\\\ are escapes.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a turn of the model's chat template.")] = False,
    length: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 32,
    eos: Annotated[bool, typer.Option(help="A text ends at the model's end token.")] = True,
    policy: PolicyOption = "confidence",
    steps: StepsOption = None,
    block_length: BlockOption = None,
    temperature: TemperatureOption = 0.9,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.9,
    cfg: CfgOption = 0.0,
    cache: CacheOption = None,
    n: CountOption = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    html: HtmlOption = None,
    live: LiveOption = False,
    source: InOption = None,
    out: OutOption = None,
    batch_size: BatchOption = 8,
) -> None:
    """Write text, from nothing or behind a prompt.

    Lines of --in are {"prompt": "..."}, or {} for a text from nothing; "id" is carried over to the results.
    """
    sampling = Sampling(policy, steps, block_length, temperature, top_k, top_p, seed, n, cfg, cache)
    shown, files = Shown(as_json, html, live), Files(source, out, batch_size)
    with checking_input():
        arguments = sampling.arguments()
        shown.check()
        if source is not None and prompt is not None:
            raise ValueError("--prompt and --in are two inputs: give one")
        records = files.records(shown, _check_prompt)
        one: Record = {} if prompt is None else {"prompt": unescaped(prompt)}
        _check_prompt(one)
    loaded, tokenizer = load_adapted(model, device)
    with checking_input():
        _check_lengths(loaded, tokenizer, [one] if records is None else records, chat, length)
    arguments |= {"length": length, "eos_id": tokenizer.eos_token_id if eos else None}

    def write(inputs: Sequence[Record], sample_index: Tensor, on_step: StepHook | None) -> list[Record]:
        rows = [_prompt_ids(tokenizer, record, chat) for record in inputs]
        return _continuations(loaded, tokenizer, rows, sample_index=sample_index, on_step=on_step, **arguments)

    if records is None:
        run_one("sample", one, write, n, steps or length, tokenizer, shown)
    else:
        settings = {**vars(sampling), "model": model, "length": length, "chat": chat, "eos": eos}
        run_batches("sample", records, write, n, files, settings)


def _check_prompt(record: Record) -> None:
    prompt = record.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f'"prompt" must be a text, got {prompt!r}')
    if prompt == "":
        raise ValueError("the prompt must not be empty; leave it out to write from nothing")


def _check_lengths(model: Any, tokenizer: Any, records: Sequence[Record], chat: bool, length: int) -> None:
    """Before the first batch of many: every prompt fits, with what is to be written."""
    longest = getattr(model.config, "max_position_embeddings", None)
    for number, record in enumerate(records, start=1):
        n_tokens = len(_prompt_ids(tokenizer, record, chat)) + length
        if longest is not None and n_tokens > longest:
            raise ValueError(
                f"input {number} has {n_tokens - length} tokens and gets {length} more, and the model takes {longest}"
            )


def _prompt_ids(tokenizer: Any, record: Record, chat: bool) -> list[int]:
    """No ids where there is no prompt."""
    prompt = record.get("prompt")
    if prompt is None:
        return []
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("--chat needs a tokenizer with a chat template, and the model's has none")
        turns = [{"role": "user", "content": prompt}]
        coded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    else:
        coded = tokenizer(prompt, verbose=False)
    ids = list(coded["input_ids"])
    if not ids:
        raise ValueError(f"the prompt must have a token, got {prompt!r}, which has none")
    return ids


def _continuations(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], *, n: int, length: int, **arguments: Any
) -> list[Record]:
    """Results for prompts, all of them with tokens or none with one."""
    import torch

    from ..sampling import generate

    longest = max(map(len, rows))
    if longest:
        prompts = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        out = generate(model, length=length, prompt_ids=prompts, attention_mask=real, n=n, **arguments)
    else:
        out = generate(model, length=length, n=n * len(rows), **arguments)
    results = []
    figures = zip(out.sequences.tolist(), out.nfe.tolist(), out.completion_tokens.tolist(), strict=True)
    for index, (sequence, nfe, n_tokens) in enumerate(figures):
        written = sequence[len(sequence) - length :][:n_tokens]
        text, completion = (
            tokenizer.decode(ids, skip_special_tokens=True) for ids in (rows[index // n] + written, written)
        )
        results.append({"text": text, "completion": completion, "tokens": n_tokens, "nfe": nfe})
    return results


def infill(
    model: ModelOption,
    text: Annotated[
        str | None, typer.Option(help="Text with [MASK:n] for n tokens; \\n, \\t and \\\\ are escapes.")
    ] = None,
    escapes: Annotated[bool, typer.Option(help="Read the escapes in --text.")] = True,
    policy: PolicyOption = "confidence",
    steps: StepsOption = None,
    block_length: BlockOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    cfg: CfgOption = 0.0,
    cache: CacheOption = None,
    n: CountOption = 1,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    html: HtmlOption = None,
    live: LiveOption = False,
    source: InOption = None,
    out: OutOption = None,
    batch_size: BatchOption = 8,
) -> None:
    """Fill the spans [MASK:n] of a text from what is on both sides of them.

    Example: diffullama infill --model runs/demo --text "def add(a, b):\\n    [MASK:12]\\n"

    Lines of --in are {"text": "... [MASK:12] ..."}, without escapes; "id" is carried over to the results.
    """
    from ..sampling import infill as infill_text

    sampling = Sampling(policy, steps, block_length, temperature, top_k, top_p, seed, n, cfg, cache)
    shown, files = Shown(as_json, html, live), Files(source, out, batch_size)
    with checking_input():
        arguments = sampling.arguments()
        shown.check()
        if (text is None) == (source is None):
            raise ValueError("give one of --text and --in")
        records = files.records(shown, _span_tokens)
        one: Record = {"text": unescaped(text) if escapes else text} if text is not None else {}
        total = _span_tokens(one) if records is None else 0
    loaded, tokenizer = load_adapted(model, device)

    def write(inputs: Sequence[Record], sample_index: Tensor, on_step: StepHook | None) -> list[Record]:
        texts = [record["text"] for record in inputs]
        out = infill_text(loaded, tokenizer, texts, **arguments, sample_index=sample_index, on_step=on_step)
        rows = zip(out.texts, out.fills, out.nfe.tolist(), strict=True)
        return [{"text": whole, "fills": fills, "nfe": nfe} for whole, fills, nfe in rows]

    if records is None:
        run_one("infill", one, write, n, min(steps or total, total), tokenizer, shown)
    else:
        run_batches("infill", records, write, n, files, {**vars(sampling), "model": model})


def _span_tokens(record: Record) -> int:
    """Tokens to fill; ValueError where the text has no span, or a wrong one."""
    from ..sampling import parse_spans

    if not isinstance(record.get("text"), str):
        raise TypeError(f'"text" must be a text with spans, got {record.get("text")!r}')
    return sum(piece for piece in parse_spans(record["text"]) if isinstance(piece, int))
