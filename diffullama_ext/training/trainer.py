# SPDX-License-Identifier: Apache-2.0
"""transformers.Trainer with the masked diffusion objective."""

from __future__ import annotations

import os
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from ..integrations import DiffusionConfig
from ..objective import DiffusionObjective, ObjectiveConfig, ObjectiveOutput
from ..schedules import AttentionAnnealing
from .checkpoints import STAGING, check_checkpoint, check_shared, checkpoints, clear, commit, explaining, rotate
from .collator import DiffusionCollator
from .numbering import EndlessStream, NumberedDataset, NumberedSampler

NOISE_INPUTS = ("maskable", "attention_mask", "document_ids", "sample_index")  # of a batch, besides its tokens
EVAL_SEED = 2**63 - 1  # of the noise of evaluation; no seed that people give a training run


def _numbered(dataset: Any) -> Any:
    """``dataset`` with its samples numbered, each one of a dict of datasets; one without a length is left as it is."""
    if isinstance(dataset, dict):
        return {name: _numbered(part) for name, part in dataset.items()}
    return (
        dataset if isinstance(dataset, NumberedDataset) or not hasattr(dataset, "__len__") else NumberedDataset(dataset)
    )


class _SkipEmptyStep(TrainerCallback):
    """Takes the gradients, all 0, from the optimiser where a whole step has nothing to score: no decay, no momentum."""

    def __init__(self, trainer: DiffusionTrainer) -> None:
        self.trainer = trainer
        self.n_known = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The count of all processes is looked at, which waits for the device, only after an empty micro-batch here."""
        n_empty, count = self.trainer.diffusion_objective.n_empty_batches, self.trainer.step_denominator
        is_of_all = args.average_tokens_across_devices or args.world_size == 1
        if n_empty > self.n_known and is_of_all and count is not None and int(count) == 0:
            cast(nn.Module, self.trainer.model).zero_grad(set_to_none=True)
        self.n_known = n_empty


class _SetEpoch(TrainerCallback):
    """Tells the sampler its epoch. accelerate does so too, but not through the loader of a resumed distributed run."""

    def __init__(self, trainer: DiffusionTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """state.epoch counts fractions of epochs; it is whole, or resumed, here."""
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


class DiffusionTrainer(Trainer):
    """``transformers.Trainer`` for models adapted with :func:`diffullama_ext.integrations.adapt`.

    What differs from Trainer:

    - The loss is :class:`diffullama_ext.objective.DiffusionObjective` with the attention annealed by optimiser step.
      Its denominator is counted over the accumulation window and all processes (``average_tokens_across_devices``), for
      every normaliser: neither changes with the micro-batch size. A step with nothing to score moves no weight (under
      the normalisers "tokens" and "masked").
    - The noise of a sample depends on (args.seed, its place in the stream of training samples); the order of samples on
      (args.data_seed or args.seed, epoch). Both are the same for any number of processes and after a resume.
    - Evaluation is bidirectional, on noise that depends on (eval_seed, place in the dataset) only: ``eval_loss`` in the
      config's normaliser, over the whole set, and ``eval_masked_nll``, the plain mean over masked tokens. (On several
      processes accelerate fills an uneven last batch with the first samples again, in training and evaluation alike.)
    - Examples hold ``input_ids`` and optionally ``attention_mask`` and ``maskable``: see :class:`DiffusionCollator`. An
      iterable dataset (no length) must number its samples itself, under ``sample_index``; it is read again and again,
      with its own ``set_epoch`` where it has one, and steps span its ends.

    Args:
        model: adapted and prepared; peft may wrap it.
        args: of transformers; ``train_sampling_strategy`` "random" or "sequential".
        objective: None takes mask_id and shift from the model's config, and the defaults of ObjectiveConfig.
        anneal_steps: None takes the model's config.
        teacher: an adapted model, in evaluation mode, for an objective with ``distill_weight``.
        eval_seed: of the noise in evaluation.
        kwargs: of Trainer (train_dataset, eval_dataset, processing_class, data_collator, callbacks, ...).

    Checkpoints are plain transformers models, written whole or not at all; ``train(resume_from_checkpoint=...)``
    refuses one that is torn or of another run (another objective, order, data or batch) and continues its own.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the count of the whole accumulation window

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        objective: ObjectiveConfig | None = None,
        anneal_steps: int | None = None,
        teacher: nn.Module | None = None,
        eval_seed: int = EVAL_SEED,
        **kwargs: Any,
    ) -> None:
        if args is not None and args.n_gpu > 1:
            raise ValueError(f"one process drives one GPU, got {args.n_gpu}; launch with torchrun or accelerate")
        strategy = getattr(args, "train_sampling_strategy", "random")
        if strategy not in ("random", "sequential"):
            raise ValueError(f"train_sampling_strategy must be 'random' or 'sequential', got {strategy!r}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func must be None; the loss is that of `objective`")
        if getattr(args, "save_on_each_node", False):
            raise ValueError("save_on_each_node must be False: a checkpoint is one folder that all nodes write into")
        sharded = bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        if sharded and getattr(args, "push_to_hub", False):
            raise ValueError("push_to_hub must be False under FSDP, got True; push the model that is saved at the end")
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = _numbered(kwargs.get(name))
        if kwargs["train_dataset"] is not None and not hasattr(kwargs["train_dataset"], "__len__"):
            kwargs["train_dataset"] = EndlessStream(kwargs["train_dataset"])
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = DiffusionCollator(
                getattr(kwargs.get("processing_class"), "pad_token_id", None) or 0
            )
        self.train_sampler: NumberedSampler | None = None
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts, by _get_num_items_in_batch, before the loss
        diffusion = DiffusionConfig.of(cast(PreTrainedModel, self.model))
        for name in ("mask_id", "shift"):  # the saved config says how to sample from what was trained
            own = getattr(diffusion, name)
            if objective is not None and getattr(objective, name) != own:
                raise ValueError(
                    f"objective must have the model's {name}, {own}, got {getattr(objective, name)}; adapt() sets it"
                )
        self.diffusion_objective = DiffusionObjective(
            objective or ObjectiveConfig(diffusion.mask_id, shift=diffusion.shift), teacher
        )
        self.annealing = AttentionAnnealing(diffusion.anneal_steps if anneal_steps is None else anneal_steps)
        self.eval_seed = eval_seed
        self._sums = self._zero_sums()
        self._staging: Path | None = None
        self.step_denominator: Tensor | None = None
        self.add_callback(_SetEpoch(self))
        self.add_callback(_SkipEmptyStep(self))

    # --- data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__"):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffle = getattr(self.args, "train_sampling_strategy", "random") == "random"
        self.train_sampler = NumberedSampler(len(dataset), shuffle=shuffle, seed=seed)
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return NumberedSampler(len(eval_dataset), shuffle=False) if hasattr(eval_dataset, "__len__") else None

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Of Trainer, with the samples numbered."""
        return super().get_eval_dataloader(eval_dataset if isinstance(eval_dataset, str) else _numbered(eval_dataset))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", *NOISE_INPUTS]  # type: ignore[assignment]

    # --- loss ---------------------------------------------------------------------------------------------------------

    def _noise(self, inputs: dict[str, Tensor], seed: int) -> dict[str, Any]:
        """Of what the objective's draw of a batch depends on, everything but x0."""
        return {"seed": seed, "step": self.state.global_step} | {name: inputs.get(name) for name in NOISE_INPUTS}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Of Trainer; nothing where all steps are made: it would make one more after the last step's checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """The denominator of one optimiser step, over its micro-batches and all processes."""
        if not batch_samples:
            return None
        count = torch.zeros((), dtype=torch.int64, device=device)
        for inputs in map(self._prepare_inputs, batch_samples):
            count += self.diffusion_objective.denominator(inputs["input_ids"], **self._noise(inputs, self.args.seed))
        if self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, reduction="sum")
        self.step_denominator = count
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ObjectiveOutput]:
        """This micro-batch's share of the loss of the optimiser step (of its own batch without num_items_in_batch)."""
        output = self.diffusion_objective(
            model,
            inputs["input_ids"],
            attn_mask_ratio=self.annealing(self.state.global_step),
            **self._noise(inputs, self.args.seed),
        )
        self._sums += torch.stack([output.stats.nll_sum, output.stats.n_scored]).double()
        loss = output.loss
        if num_items_in_batch is not None:
            loss = output.stats.weighted_sum / torch.as_tensor(num_items_in_batch).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, this makes a sum
        return (loss, output) if return_outputs else loss

    def _zero_sums(self, size: int = 2) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Of Trainer; adds to the training loss the mean over masked tokens and the attention's ratio."""
        if "loss" in logs:
            nll_sum, count = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            logs["masked_nll"] = nll_sum / max(count, 1)
            logs["attn_mask_ratio"] = self.annealing(max(self.state.global_step - 1, 0))
            self._sums = self._zero_sums()
        super().log(logs, *args, **kwargs)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds parts of the model only: under FSDP and ZeRO-3."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def whole_model(self) -> Any:
        """Of a model under FSDP a copy in one piece, on the CPU of the processes that save, None on the others.

        All processes take part. A peft model stays one.
        """
        sharded = cast(Any, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        state = {}
        for name, tensor in sharded.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.args.should_save:
                state[name] = whole.cpu()
        if not self.args.should_save:
            return None
        with torch.device("meta"):  # the parameters of the one that trains are in parts
            model: Any = AutoModelForCausalLM.from_config(sharded.config)
            model.generation_config = getattr(sharded, "generation_config", None) or model.generation_config
            if hasattr(sharded, "peft_config"):
                model = type(sharded)(model, sharded.peft_config["default"])
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of Trainer; of a model under FSDP all of it, in one piece, whatever form its checkpoints have."""
        if not self.is_fsdp_enabled or _internal_call:
            return super().save_model(output_dir, _internal_call)
        model, folder = self.whole_model(), output_dir or cast(str, self.args.output_dir)
        if model is not None:
            model.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        return None

    def run_identity(self) -> dict[str, Any]:
        """What a run may not change when it resumes, for JSON; processes and micro-batches it may."""
        args, dataset = self.args, cast(Any, self.train_dataset)
        size = len(dataset) if hasattr(dataset, "__len__") else None
        digest = 0
        for place in range(0, size or 0, max(1, (size or 0) // 16)):
            row = dataset.dataset[place] if isinstance(dataset, NumberedDataset) else dataset[place]
            for name in ("input_ids", "maskable", "attention_mask", "document_ids"):
                if row.get(name) is not None:
                    digest = zlib.crc32(torch.as_tensor(row[name]).long().numpy().tobytes(), digest)
        micro_batch = args.train_batch_size * args.world_size
        return {
            "objective": asdict(self.diffusion_objective.config),
            "anneal_steps": self.annealing.anneal_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "order": getattr(args, "train_sampling_strategy", "random"),
            "samples": size,
            "digest of some samples": digest,
            "samples a step": micro_batch * args.gradient_accumulation_steps,
            **({"drop_last of micro-batches of": micro_batch} if args.dataloader_drop_last else {}),
        }

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Of Trainer; ValueError for a checkpoint that is torn or of another run. True takes the last one."""
        out = Path(self.args.output_dir or "")
        if self.is_world_process_zero():
            clear(out)
        if self.args.world_size > 1:
            check_shared(out, self.accelerator)
        if resume_from_checkpoint is True:
            found = checkpoints(out)
            if not found:
                raise FileNotFoundError(f"no checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(found[-1])
        if resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint), self.run_identity())
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.state.global_step == 0 < self.state.max_steps:
            n = self.args.train_batch_size * self.args.world_size
            raise ValueError(f"train_dataset gave no batch: it is empty, or drop_last leaves out less than {n} samples")
        if resume_from_checkpoint and self.is_world_process_zero():
            self._rotate(out)  # which the killed process may not have come to
        return output

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Of Trainer, into a hidden folder that gets its name when all processes are through."""
        out, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        main, staging = self.is_world_process_zero(), out / STAGING
        with explaining(out / name):
            if main:
                clear(out)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(out / name)
            if main:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))  # it had its own hidden name
                commit(staging / name, out / name, self.run_identity())
                shutil.rmtree(staging)
                self._rotate(out)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(out / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Of Trainer, which uploads in the background; so not before the checkpoint has its name."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _rotate(self, out: Path) -> None:
        best = Path(self.state.best_model_checkpoint or "").name
        rotate(out, self.args.save_total_limit, {f"checkpoint-{self.state.global_step}", best})

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """(loss of the batch, None, None); a diffusion model has no logits of a whole batch to hand on."""
        inputs = self._prepare_inputs(inputs)
        noise = self._noise(inputs, self.eval_seed)
        with torch.no_grad():
            output = self.diffusion_objective(model, inputs["input_ids"], **noise)
        denominator = self.diffusion_objective.denominator(inputs["input_ids"], **noise)
        stats = output.stats
        self._eval_sums += torch.stack([stats.weighted_sum, denominator, stats.nll_sum, stats.n_scored]).double()
        return output.loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Of Trainer, whose mean over batches is replaced by the quotient of sums over the whole set."""
        self._eval_sums = self._zero_sums(4)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        weighted, denominator, nll_sum, count = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
        metrics = output.metrics or {}
        metrics[f"{metric_key_prefix}_loss"] = weighted / max(denominator, 1)
        metrics[f"{metric_key_prefix}_masked_nll"] = nll_sum / max(count, 1)
        return output._replace(metrics=metrics)
