# SPDX-License-Identifier: Apache-2.0
"""DiffusionTrainer: what may not change the run, and what comes out of it."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, get_peft_model
from processes import run_processes
from tiny_models import MASK_ID, VOCAB, causal_lm
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from diffullama_ext.integrations import DiffusionConfig, adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig
from diffullama_ext.schedules import AttentionAnnealing
from diffullama_ext.training import DiffusionCollator, DiffusionTrainer

ANNEAL_STEPS = 5


def examples(n: int = 18) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 15, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(VOCAB, (length,), generator=generator).tolist()} for length in lengths]


def adapted(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    return adapt(causal_lm(family, **overrides), mask_token=MASK_ID, anneal_steps=ANNEAL_STEPS)


def arguments(path: Path, **changed: Any) -> TrainingArguments:
    given = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 7,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**given | changed)


def trained(
    path: Path, model: PreTrainedModel | None = None, resume: str | None = None, **changed: Any
) -> DiffusionTrainer:
    names = ("objective", "eval_seed", "anneal_steps", "callbacks")
    own = {name: changed.pop(name) for name in names if name in changed}
    data = changed.pop("train_dataset", None) or examples()
    trainer = DiffusionTrainer(
        model or adapted(), arguments(path, **changed), train_dataset=data, eval_dataset=examples()[:7], **own
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def curve(trainer: DiffusionTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: DiffusionTrainer) -> list[Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


# --- the loss of a step -----------------------------------------------------------------------------------------------


def stream(n: int, size: int = 18, seed: int = 42) -> list[tuple[int, int]]:
    """(number, index) of the first n samples of a run, from the contract: a permutation by (seed, epoch)."""
    order: list[tuple[int, int]] = []
    while len(order) < n:
        epoch = len(order) // size
        permutation = torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        order += [(epoch * size + place, index) for place, index in enumerate(permutation)]
    return order[:n]


def test_each_step_is_the_objective_under_the_annealed_mask(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=6, learning_rate=0.0)
    objective, data = DiffusionObjective(ObjectiveConfig(MASK_ID)), examples()
    batches = [4, 4, 4, 4, 2, 4]  # 18 samples, then the next epoch
    numbered, model = stream(sum(batches)), adapted().train()
    for step, size in enumerate(batches):
        taken, numbered = numbered[:size], numbered[size:]
        batch = DiffusionCollator()([data[index] | {"sample_index": number} for number, index in taken])
        out = objective(
            model,
            batch.pop("input_ids"),
            seed=42,
            step=step,
            attn_mask_ratio=AttentionAnnealing(ANNEAL_STEPS)(step),
            **batch,
        )
        assert curve(trainer)[step] == pytest.approx(out.loss.item(), rel=1e-5)
        assert curve(trainer, "masked_nll")[step] == pytest.approx(
            (out.stats.nll_sum / out.stats.n_scored).item(), rel=1e-5
        )
    assert curve(trainer, "attn_mask_ratio") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch"])
def test_the_micro_batch_size_changes_nothing(normalizer: str, tmp_path: Path) -> None:
    config = ObjectiveConfig(MASK_ID, normalizer=normalizer, strata=4)
    whole = trained(tmp_path, objective=config)
    for size in (2, 1):
        split = trained(
            tmp_path, objective=config, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size
        )
        assert curve(split) == pytest.approx(curve(whole), rel=1e-4)
        for a, b in zip(weights(split), weights(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_training_learns(tmp_path: Path) -> None:
    constant = [{"input_ids": [word] * 12} for word in range(10, 26)]
    nll = curve(trained(tmp_path, max_steps=40, train_dataset=constant, anneal_steps=10), "masked_nll")
    assert sum(nll[-10:]) < 0.5 * sum(nll[:10])


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    changed = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 9}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
    whole = trained(tmp_path, adapted("gpt2", **dropout), **changed)
    for checkpoint in ("checkpoint-3", "checkpoint-6"):  # inside the first and the second epoch
        resumed = trained(tmp_path, adapted("gpt2", **dropout), resume=str(tmp_path / checkpoint), **changed)
        assert curve(resumed) == curve(whole)
        assert curve(resumed, "eval_loss") == curve(whole, "eval_loss")
        assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))


def run_in_processes(
    path: Path, count: int, model: dict[str, Any] | None = None, **changed: Any
) -> tuple[list[float], list[Tensor]]:
    """(losses, weights) of ``count`` processes that share the batch; ``model`` is what :func:`adapted` takes."""
    code = f"""
import torch
from pathlib import Path
from test_trainer import adapted, curve, examples, trained, weights
trainer = trained(Path({str(path)!r}), adapted(**{model or {}!r}), train_dataset=examples(16), **{changed!r})
if trainer.args.process_index == 0:
    torch.save((curve(trainer), weights(trainer)), {str(path / "run.pt")!r})
"""
    run_processes(code, count)
    return torch.load(path / "run.pt")


resumes_on_cpus = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.18"),
    reason="transformers < 5.18 loads the optimiser of several CPU processes to 'cpu:0', which torch refuses",
)


@resumes_on_cpus
@pytest.mark.slow
def test_two_processes_continue_the_run_of_one(tmp_path: Path) -> None:
    """From the middle of the second epoch into the third."""
    single = trained(tmp_path, train_dataset=examples(16), max_steps=10, save_strategy="steps", save_steps=6)
    losses, parameters = run_in_processes(
        tmp_path, 2, max_steps=10, per_device_train_batch_size=2, resume=str(tmp_path / "checkpoint-6")
    )
    assert losses == pytest.approx(curve(single), rel=1e-4)
    for a, b in zip(parameters, weights(single), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalizer", ["tokens", "masked"])
def test_a_step_with_nothing_to_score_moves_no_weight(normalizer: str, tmp_path: Path) -> None:
    """Steps 0, 2, ... are all prompt; AdamW would decay the weights there, and go on by its momentum."""
    data = [{"input_ids": [9, 10, 11, 12], "maskable": [(i // 4) % 2] * 4} for i in range(16)]
    model, snapshots = adapted(), [[p.detach().clone() for p in adapted().parameters()]]

    class Snapshot(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            snapshots.append([p.detach().clone() for p in model.parameters()])

    options = {"weight_decay": 0.5, "max_steps": 4, "train_sampling_strategy": "sequential"}
    config = ObjectiveConfig(MASK_ID, normalizer=normalizer)
    trainer = DiffusionTrainer(
        model, arguments(tmp_path, **options), objective=config, train_dataset=data, callbacks=[Snapshot()]
    )
    with pytest.warns(UserWarning, match="no token that may be masked and scored"):
        trainer.train()
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(snapshots)]
    assert moved == [False, True, False, True]
    assert trainer.diffusion_objective.n_empty_batches == 2


@pytest.mark.slow
def test_processes_stay_together_where_one_has_nothing_to_score(tmp_path: Path) -> None:
    """Each process with a denominator of its own; the first one has prompts alone."""
    code = f"""
import torch
from test_trainer import adapted, trained, weights
data = [{{"input_ids": [9, 10, 11, 12], "maskable": [i % 2] * 4}} for i in range(8)]
options = {{"average_tokens_across_devices": False, "train_sampling_strategy": "sequential", "max_steps": 3}}
trainer = trained({str(tmp_path)!r}, train_dataset=data, per_device_train_batch_size=1, **options)
torch.save(weights(trainer), {str(tmp_path)!r} + f"/{{trainer.args.process_index}}.pt")
"""
    run_processes(code, 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, adapted().parameters(), strict=True))


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    assert curve(trained(tmp_path, seed=1)) != curve(trained(tmp_path, seed=2))


def test_the_data_seed_alone_orders_the_data(tmp_path: Path) -> None:
    def order(**seeds: int) -> list[Tensor]:
        trainer = DiffusionTrainer(adapted(), arguments(tmp_path, **seeds), train_dataset=examples())
        return [row for batch in trainer.get_train_dataloader() for row in batch["input_ids"][:, :3].unbind()]

    assert torch.equal(torch.stack(order(seed=1, data_seed=9)), torch.stack(order(seed=2, data_seed=9)))
    assert torch.equal(torch.stack(order(seed=9)), torch.stack(order(seed=2, data_seed=9)))
    assert not torch.equal(torch.stack(order(seed=1)), torch.stack(order(seed=2)))


def test_the_sampler_learns_a_resumed_epoch(tmp_path: Path) -> None:
    trainer = DiffusionTrainer(adapted(), arguments(tmp_path), train_dataset=examples())
    trainer.get_train_dataloader()
    trainer.state.epoch = 2.5  # as loaded from a checkpoint in the middle of the third epoch
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.train_sampler is not None
    assert next(iter(trainer.train_sampler))[0] == 2 * 18


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence"])
def test_evaluation_has_fixed_noise_and_a_global_denominator(normalizer: str, tmp_path: Path) -> None:
    config, data = ObjectiveConfig(MASK_ID, normalizer=normalizer), examples()[:7]
    got = [
        DiffusionTrainer(
            adapted(),
            arguments(tmp_path, per_device_eval_batch_size=size, seed=size),
            objective=config,
            eval_dataset=data,
        ).evaluate()
        for size in (1, 3, 7)
    ]
    batch = DiffusionCollator()([example | {"sample_index": i} for i, example in enumerate(data)])
    out = DiffusionObjective(config)(adapted(), batch.pop("input_ids"), seed=2**63 - 1, **batch)
    for metrics in got:
        assert metrics["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
        assert metrics["eval_masked_nll"] == pytest.approx((out.stats.nll_sum / out.stats.n_scored).item(), rel=1e-5)


def test_several_evaluation_sets_and_the_eval_seed(tmp_path: Path) -> None:
    sets = {"a": examples()[:4], "b": examples()[4:9]}
    metrics = DiffusionTrainer(adapted(), arguments(tmp_path), eval_dataset=sets).evaluate()
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]
    other = DiffusionTrainer(adapted(), arguments(tmp_path), eval_dataset=sets, eval_seed=5)
    assert other.evaluate(eval_dataset=sets["a"])["eval_loss"] != metrics["eval_a_loss"]


# --- what comes out, what goes in -------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_plain_transformers_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path, save_strategy="steps", save_steps=7)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7").eval()
    assert json.loads((tmp_path / "checkpoint-7" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert DiffusionConfig.of(plain) == DiffusionConfig(MASK_ID, shift=True, anneal_steps=ANNEAL_STEPS)
    x = torch.randint(VOCAB, (2, 9))
    torch.testing.assert_close(plain(x).logits, trainer.model.eval()(x).logits, rtol=1e-4, atol=1e-4)


def test_a_hugging_face_dataset_with_other_columns_gives_the_same_run(tmp_path: Path) -> None:
    rows = [example | {"text": "x", "maskable": [1] * len(example["input_ids"])} for example in examples()]
    assert curve(trained(tmp_path, train_dataset=datasets.Dataset.from_list(rows))) == curve(trained(tmp_path))


def test_prompts_are_never_scored(tmp_path: Path) -> None:
    rows = [example | {"maskable": [0] * len(example["input_ids"])} for example in examples()]
    with pytest.warns(UserWarning, match="no token that may be masked and scored"):
        assert curve(trained(tmp_path, train_dataset=rows, max_steps=3)) == [0.0, 0.0, 0.0]


class Stream(IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_an_iterable_dataset_numbers_its_own_samples(tmp_path: Path) -> None:
    rows = examples()
    with pytest.raises(ValueError, match=r"must hold 'sample_index', got .*; an iterable dataset must number"):
        trained(tmp_path, train_dataset=Stream(rows), max_steps=2)
    numbered = [row | {"sample_index": i} for i, row in enumerate(rows)]
    assert curve(trained(tmp_path, train_dataset=Stream(numbered), max_steps=4)) == curve(
        trained(tmp_path, train_sampling_strategy="sequential", max_steps=4)
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(tmp_path: Path) -> None:
    model = get_peft_model(adapted(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    frozen = model.get_base_model().model.embed_tokens.weight.clone()
    trainer = trained(tmp_path, model)
    assert len(curve(trainer)) == 7
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, frozen)
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [({"bf16": True}, 0.1), ({f"{CHECKPOINTING}_checkpointing": True}, 1e-6)],
    ids=["bf16", "activation checkpointing"],
)
def test_options_of_trainer(changed: dict, tolerance: float, tmp_path: Path) -> None:
    assert curve(trained(tmp_path, **changed)) == pytest.approx(curve(trained(tmp_path)), rel=tolerance)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda args: DiffusionTrainer(causal_lm("llama"), args), "LlamaForCausalLM is not adapted to diffusion"),
        (
            lambda args: DiffusionTrainer(adapted(), SimpleNamespace(n_gpu=2)),
            "one process drives one GPU, got 2; launch with torchrun or accelerate",
        ),
        (
            lambda args: DiffusionTrainer(
                adapted(), SimpleNamespace(n_gpu=1, train_sampling_strategy="group_by_length")
            ),
            "train_sampling_strategy must be 'random' or 'sequential', got 'group_by_length'",
        ),
        (
            lambda args: DiffusionTrainer(adapted(), args, compute_loss_func=nn.functional.cross_entropy),
            "compute_loss_func must be None; the loss is that of `objective`",
        ),
        (
            lambda args: DiffusionTrainer(adapted(), args, anneal_steps=-1),
            "anneal_steps must be at least 0, got -1",
        ),
        (
            lambda args: DiffusionTrainer(adapted(), args, objective=ObjectiveConfig(3)),
            f"objective must have the model's mask_id, {MASK_ID}, got 3",
        ),
        (
            lambda args: DiffusionTrainer(adapted(), args, objective=ObjectiveConfig.recipe("llada", mask_id=MASK_ID)),
            "objective must have the model's shift, True, got False",
        ),
        (
            lambda args: DiffusionTrainer(adapted(), SimpleNamespace(n_gpu=1, save_on_each_node=True)),
            "save_on_each_node must be False",
        ),
        (
            lambda args: DiffusionTrainer(adapted(), SimpleNamespace(n_gpu=1, fsdp=True, push_to_hub=True)),
            "push_to_hub must be False under FSDP",
        ),
    ],
    ids=[
        "not adapted",
        "DataParallel",
        "sampling",
        "loss function",
        "anneal_steps",
        "mask id",
        "shift",
        "each node",
        "push",
    ],
)
def test_the_trainer_refuses(make: Callable, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make(arguments(tmp_path))
