# SPDX-License-Identifier: Apache-2.0
"""The main job, small: text -> tokenizer -> autoregressive GPT-2 -> masked diffusion model -> figures and samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention_mask import AttentionMask
from ..data import Corpus, pack, python_corpus, train_tokenizer
from ..evaluation import DiffusionScores, Estimate, EvaluationConfig, autoregressive_loss, diffusion_scores
from ..integrations import DiffusionConfig, adapt
from .config import DemoConfig
from .models import autoregressive_loss_of, diffusion_loss_of, new_model
from .samples import Infilled, infill_heldout, sample_texts
from .training import LossOf, Samples, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Report = Callable[[str, int, int, str], None]  # (stage, done, in all, note)

AS_IS_CAUSAL = "AR, causal"
AS_IS = "AR as it is"
ADAPTED = "adapted"
SCRATCH = "from scratch"
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Scores:
    """The held-out figures of one model."""

    ar_loss: Estimate
    diffusion: DiffusionScores


@dataclass
class DemoRun:
    """What a run made; filled stage by stage."""

    config: DemoConfig
    device: torch.device
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    train: Tensor  # [N, L] int32
    heldout: Tensor  # [M, L] int32
    model: PreTrainedModel | None = None  # the adapted one
    scores: dict[str, Scores] = field(default_factory=dict)
    training_loss: dict[str, list[float]] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    infilled: list[Infilled] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def difference(self, other: str) -> Estimate:
        """Diffusion loss of the adapted model minus that of another, paired: same blocks, same noise."""
        return self.scores[ADAPTED].diffusion.diffusion_loss - self.scores[other].diffusion.diffusion_loss


class _Stages:
    """Times the stages of a run and passes their progress on."""

    def __init__(self, report: Report | None) -> None:
        self.report = report or (lambda stage, done, total, note: None)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Yields progress(done, total, loss=None); a stage that never calls it is one piece."""
        left = 1

        def progress(done: int, total: int, loss: float | None = None) -> None:
            nonlocal left
            left = total - done
            self.report(name, done, total, "" if loss is None else f"loss {loss:.2f}")

        start = time.perf_counter()
        progress(0, 1)
        yield progress
        if left:
            progress(1, 1)
        self.seconds[name] = time.perf_counter() - start


def run_demo(config: DemoConfig, device: torch.device | str = "cpu", report: Report | None = None) -> DemoRun:
    """Run every stage; nothing is written to disk.

    Three trainings share blocks, order, noise and optimiser settings: the autoregressive one, and from its end and from
    random weights the same ``diffusion_steps`` of diffusion on the samples that follow.

    Args:
        config: sizes and steps.
        device: where models live.
        report: called as report(stage, done, in all, note).
    """
    device = torch.device(device)
    stages = _Stages(report)
    run = _prepared(config, device, stages)
    run.seconds = stages.seconds

    model: Any = new_model(config, run.tokenizer).to(device)  # type: ignore[arg-type]
    blank = copy.deepcopy(model)  # the same start for the training from scratch
    steps = config.ar_steps
    _fit(run, stages, "train AR", model, autoregressive_loss_of(model), steps, config.ar_learning_rate)

    blank_tokenizer = copy.deepcopy(run.tokenizer)
    adapt(model, run.tokenizer, anneal_steps=config.anneal_steps)
    adapt(blank, blank_tokenizer, anneal_steps=config.anneal_steps)
    _score(run, stages, AS_IS, model)
    _score(run, stages, AS_IS_CAUSAL, model, AttentionMask.causal(config.length, device=device))
    for name, stage, start in ((ADAPTED, "adapt", model), (SCRATCH, "train from scratch", blank)):
        loss_of = diffusion_loss_of(start, config)
        _fit(run, stages, stage, start, loss_of, config.diffusion_steps, config.learning_rate, after=config.ar_steps)
        _score(run, stages, name, start)
    run.model = model.eval()

    with stages.stage("sample"):
        run.samples = sample_texts(run.model, run.tokenizer, config)
        run.infilled = infill_heldout(run.model, run.tokenizer, run.corpus.heldout, config)
    return run


def _prepared(config: DemoConfig, device: torch.device, stages: _Stages) -> DemoRun:
    """Corpus, tokenizer and blocks."""
    with stages.stage("corpus"):
        corpus = python_corpus(heldout_share=HELDOUT_SHARE, max_chars=config.corpus_chars)
    with stages.stage("tokenizer"):
        # one id is left for the mask token that adapt() adds
        tokenizer = train_tokenizer(
            (document.text for document in corpus.train), config.vocab_size - 1, max_length=config.length
        )
        train = pack((document.text for document in corpus.train), tokenizer, config.length)
        heldout = pack((document.text for document in corpus.heldout), tokenizer, config.length)
    order = torch.randperm(len(heldout), generator=torch.Generator().manual_seed(config.seed))
    return DemoRun(config, device, corpus, tokenizer, train, heldout[order[: config.heldout_blocks]])


def _fit(
    run: DemoRun,
    stages: _Stages,
    stage: str,
    model: PreTrainedModel,
    loss_of: LossOf,
    steps: int,
    learning_rate: float,
    after: int = 0,
) -> None:
    """Train on the samples behind the first ``after`` steps."""
    config = run.config
    samples = Samples(run.train, after * config.batch_size, config.seed)
    with stages.stage(stage) as progress:
        run.training_loss[stage] = fit(
            model,
            samples,
            loss_of,
            steps=steps,
            batch_size=config.batch_size,
            learning_rate=learning_rate,
            bf16=config.bf16,
            progress=progress,
        )


def _score(
    run: DemoRun, stages: _Stages, name: str, model: PreTrainedModel, diffusion_mask: AttentionMask | None = None
) -> None:
    evaluation = EvaluationConfig(draws=run.config.draws, seed=run.config.seed)
    diffusion = DiffusionConfig.of(model)
    with stages.stage(f"evaluate {name}") as progress:
        ar_loss = autoregressive_loss(model, run.heldout)
        run.scores[name] = Scores(
            ar_loss,
            diffusion_scores(
                model,
                run.heldout,
                evaluation,
                mask_id=diffusion.mask_id,
                shift=diffusion.shift,
                diffusion_mask=diffusion_mask,
                progress=progress,
            ),
        )
