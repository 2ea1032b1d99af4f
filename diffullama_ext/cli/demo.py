# SPDX-License-Identifier: Apache-2.0
"""`diffullama demo`: the main job on the text that Python carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import pick_device, quiet_libraries, reporting, scores_table
from .errors import checking_input

if TYPE_CHECKING:
    from ..demo import DemoRun


def demo(
    out: Annotated[Path, typer.Option(help="Run directory: new, empty or of a former demo.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; tests the path only.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; CUDA runs a larger model.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order, noise and samples.")] = 0,
) -> None:
    """Train a small GPT-2, adapt it to masked diffusion, and compare it on held-out text.

    The text is the documentation and standard library of this Python: no network is needed. Three models are scored
    with the same noise: the autoregressive model as it is, the adapted one, and one of the same size trained from
    scratch on the same diffusion samples. OUT gets model/ (for transformers), metrics.json, samples.jsonl and
    samples.txt.
    """
    from ..demo import DemoConfig, check_replaceable, run_demo, write_run

    with checking_input():
        where = pick_device(device)
        check_replaceable(out)
    config = DemoConfig.preset("quick" if quick else where.type, seed=seed)
    quiet_libraries()
    with reporting() as report:
        run = run_demo(config, where, report)
    write_run(run, out)
    _show(run, out)


def _show(run: DemoRun, out: Path) -> None:
    from rich.console import Console

    from ..demo.pipeline import ADAPTED

    console = Console(soft_wrap=True, highlight=False)
    n_tokens, n_blocks = run.heldout.numel(), len(run.heldout)
    title = f"Held-out text: {n_tokens} tokens in {n_blocks} blocks, nats ± standard error, one noise for all"
    console.print(scores_table(title, {name: (s.ar_loss, s.diffusion) for name, s in run.scores.items()}))
    for name in run.scores:
        if name != ADAPTED:
            console.print(f"ELBO/token, {ADAPTED} minus {name}: {run.difference(name)}", markup=False)
    console.print(
        "All models predict token i+1 from row i. 'AR as it is' is the autoregressive model with the mask token added "
        "and no further training, with bidirectional attention; 'AR, causal' is the same with the causal attention it "
        "was trained with. AR loss is with causal attention for every model; acc is of masked tokens at masking rate t."
    )
    for item in run.infilled[:1]:
        console.print(f"\n{item.document}, held out:\n{item.prompt}", markup=False)
        console.print(f"written:  {item.filled}\nheld out: {item.truth}", markup=False)
    console.print(f"\n{sum(run.seconds.values()):.0f} s; model, metrics and samples are in {out}", markup=False)
