# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient norm of the first steps after the autoregressive training of the demo, by the annealing.

    python benchmarks/anneal_gradients.py --seeds 4 --json first_steps.json

The demo's model is trained left to right as the demo does it, once a seed, and kept under --cache. From its end the
same model goes on, on the same blocks with the same noise: bidirectional at once ("none"), annealed over several
lengths, causal for good, or autoregressive. Learning rate, warm-up and clipping are the demo's; norms are before it.
Everything is paired by seed, so the last columns are means over seeds of the ratio to "causal", with standard errors.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffullama_ext.data import pack, python_corpus, train_tokenizer
from diffullama_ext.demo.config import DemoConfig
from diffullama_ext.demo.models import autoregressive_loss_of, diffusion_loss_of, new_model
from diffullama_ext.demo.training import Samples, fit
from diffullama_ext.integrations import adapt

CAUSAL = 10**9  # annealing over so many steps has not begun after 50
LENGTHS = {"none": 0, "50": 50, "150": 150, "450": 450, "causal": CAUSAL}  # the demo's is 150
AR = "AR goes on"


class FirstSteps(NamedTuple):
    """One value a step."""

    loss: list[float]
    norm: list[float]  # L2 of all gradients, before clipping


def prepared(config: DemoConfig) -> tuple[Any, Tensor]:
    """The demo's tokenizer and training blocks [N, L]."""
    corpus = python_corpus(heldout_share=0.1, max_chars=config.corpus_chars)
    texts = [document.text for document in corpus.train]
    tokenizer = train_tokenizer(iter(texts), config.vocab_size - 1, max_length=config.length)
    return tokenizer, pack(iter(texts), tokenizer, config.length)


def autoregressive(config: DemoConfig, tokenizer: Any, train: Tensor, cache: Path | None) -> Any:
    """The demo's model after its autoregressive training."""
    model: Any = new_model(config, tokenizer)
    kept = None if cache is None else cache / f"ar-{config.layers}x{config.width}-{config.ar_steps}-{config.seed}.pt"
    if kept is not None and kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model
    fit(
        model,
        Samples(train, 0, config.seed),
        autoregressive_loss_of(model),
        steps=config.ar_steps,
        batch_size=config.batch_size,
        learning_rate=config.ar_learning_rate,
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    return model


def first_steps(
    config: DemoConfig, model: Any, tokenizer: Any, train: Tensor, anneal_steps: int | None, n: int
) -> FirstSteps:
    """n steps of a copy of ``model``; anneal_steps None goes on autoregressively, at the adaptation's learning rate."""
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    if anneal_steps is None:
        loss_of = autoregressive_loss_of(model)
    else:
        loss_of = diffusion_loss_of(adapt(model, tokenizer, anneal_steps=anneal_steps), config)
    seen = FirstSteps([], [])

    def observe(step: int, loss: float, norm: float) -> None:
        seen.loss.append(loss)
        seen.norm.append(norm)

    fit(
        model,
        Samples(train, config.ar_steps * config.batch_size, config.seed),
        loss_of,
        steps=config.diffusion_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        observe=observe,
        stop=n,
    )
    return seen


def mean_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} +- {error:.2f}"


def table(runs: dict[str, list[FirstSteps]]) -> str:
    """Markdown, a row a way: means over seeds, with standard errors."""

    def columns(run: FirstSteps, causal: FirstSteps) -> list[float]:
        ratio = [a / b for a, b in zip(run.norm, causal.norm, strict=True)]
        return [
            run.loss[0],
            run.norm[0],
            statistics.mean(run.norm[:5]),
            statistics.median(run.norm),
            max(run.norm),
            ratio[0],
            statistics.mean(ratio[:5]),
            statistics.mean(ratio),
        ]

    lines = [
        "| annealing steps | loss, step 0 | norm, step 0 | norm, steps 0-4 | median | max | step 0 / causal "
        "| 0-4 / causal | all / causal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, seeds in runs.items():
        values = [columns(run, causal) for run, causal in zip(seeds, runs["causal"], strict=True)]
        cells = [mean_error(list(column)) for column in zip(*values, strict=True)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="models, each trained from its own start and order")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ar-steps", type=int, default=DemoConfig().ar_steps)
    parser.add_argument("--layers", type=int, default=DemoConfig().layers)
    parser.add_argument("--cache", type=Path, default=None, help="folder that keeps the autoregressive models")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    tokenizer, train = prepared(DemoConfig())
    runs: dict[str, list[FirstSteps]] = {way: [] for way in (*LENGTHS, AR)}
    for seed in range(arguments.seeds):
        config = DemoConfig(seed=seed, ar_steps=arguments.ar_steps, layers=arguments.layers)
        model = autoregressive(config, tokenizer, train, arguments.cache)
        for way in runs:
            runs[way].append(first_steps(config, model, tokenizer, train, LENGTHS.get(way), arguments.steps))
        print(f"{seed + 1} of {arguments.seeds} seeds", flush=True)
        if arguments.json is not None:
            written = {way: [seen._asdict() for seen in seeds] for way, seeds in runs.items()}
            result = {"ar_steps": config.ar_steps, "layers": config.layers, "torch": torch.__version__, "runs": written}
            arguments.json.write_text(json.dumps(result))
    print(table(runs))


if __name__ == "__main__":
    main()
