# SPDX-License-Identifier: Apache-2.0
"""Everything that decides an adaptation: one dataclass for YAML, flags, presets and the record kept with the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from .checks import check_choice, check_range
from .data import PADDINGS, SftColumns
from .data.blocks import CONTEXTS
from .objective import RECIPES, ObjectiveConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
DEVICES = ("auto", "cpu", "cuda")
MOST = 2**31 - 1  # of a count


def _option(default: Any, text: str) -> Any:
    """A field with its help."""
    if default == {}:
        return field(default_factory=dict, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class AdaptConfig:
    """One adaptation. A field is a key of the YAML file and, with dashes, a flag of ``diffullama adapt``."""

    model: str = _option("", "Causal language model, or an adapted one to train on: a folder, or an id of the Hub.")
    data: tuple[str, ...] = _option((), "Text, .jsonl, .parquet, a folder of these, or an id of the Hub; repeatable.")
    data_weight: tuple[float, ...] = _option((), "Share of each --data in the mixture; by default equal.")
    column: str = _option("text", "Column of the text in .jsonl, .parquet and datasets.")
    sft: bool = _option(False, "Rows of prompt and response, or chats: the prompt is neither noised nor scored.")
    prompt_column: str = _option(SftColumns.prompt, "With --sft: column of the prompt.")
    response_column: str = _option(SftColumns.response, "With --sft: column of the response.")
    messages_column: str = _option(SftColumns.messages, "With --sft: column of chats, which the chat template writes.")
    padding: str = _option("eos", "With --sft: eos trains end-of-text tokens up to --length; exclude trains one.")
    length: int | None = _option(None, "Tokens of a block, most of an example; default 512 or the model's limit.")
    context: str | None = _option(None, "overlap (default with the shift): blocks share a token; or none.")
    isolate_documents: bool = _option(False, "Attention stays inside documents.")
    heldout: float = _option(0.05, "Share of the blocks or examples that is held out and scored on.")
    steps: int = _option(1000, "Optimiser steps.")
    batch_size: int = _option(8, "Blocks a forward and process.")
    accumulate: int = _option(1, "Forwards a step.")
    global_batch_size: int | None = _option(None, "Blocks a step over all processes; sets --accumulate.")
    learning_rate: float = _option(1e-4, "Peak.")
    schedule: str = _option("cosine", "Of the learning rate: cosine, linear or constant_with_warmup.")
    warmup_steps: int | None = _option(None, "Steps up to the peak; default 5 % of the steps.")
    weight_decay: float = _option(0.0, "Of AdamW.")
    adam_beta2: float = _option(0.999, "Of AdamW; beta1 is 0.9.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to it; 0 clips none.")
    anneal_steps: int | None = _option(
        None, "Steps from causal to bidirectional attention; default a third, of an adapted model none."
    )
    shift: bool | None = _option(None, "Row i of the logits predicts token i+1; default as before.")
    mask_token: str | None = _option(None, "Text, or id in digits; default the model's, the tokenizer's, or a new one.")
    objective: dict[str, Any] = _option({}, "key=value of ObjectiveConfig, or recipe=NAME; repeatable.")  # noqa: RUF009
    teacher: str | None = _option(None, "Adapted model to distil from, with --objective distill_weight=...")
    lora_rank: int = _option(0, "Rank of LoRA adapters on every linear layer; 0 trains all weights.")
    lora_alpha: int | None = _option(None, "Scale of LoRA; default twice the rank.")
    lora_dropout: float = _option(0.0, "Of LoRA.")
    bf16: bool = _option(False, "bfloat16 autocast; the weights stay float32.")
    fp16: bool = _option(False, "float16 autocast with loss scaling; CUDA only.")
    activation_checkpointing: bool = _option(False, "Recompute activations in the backward.")
    compile: bool = _option(False, "torch.compile.")
    save_steps: int | None = _option(None, "Steps between checkpoints; default a tenth of the steps.")
    save_total_limit: int = _option(2, "Checkpoints kept.")
    eval_steps: int | None = _option(None, "Steps between the curves by t; default half of the steps.")
    logging_steps: int | None = _option(None, "Steps between logged losses; default a hundredth of the steps.")
    report_to: tuple[str, ...] = _option((), "Loggers of Trainer: tensorboard, wandb, ...; repeatable.")
    device: str = _option("auto", "auto, cpu or cuda.")
    seed: int = _option(0, "Of order and noise.")

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _as_declared(name, getattr(self, name), kind))
        for name, (low, high, *opened) in _INTERVALS.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                check_range(name, number, low, high, low_open="low" in opened, high_open="high" in opened)
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        for name in ("column", "prompt_column", "response_column", "messages_column", "mask_token", "teacher"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty, got ''")
        self._check_together()
        if self.objective_config(mask_id=0).loss_weight == "cart" and self.isolate_documents:
            raise ValueError("isolate_documents must be False with loss_weight 'cart', which looks across documents")

    def _check_together(self) -> None:
        """What one setting asks of another."""
        if self.data_weight and len(self.data_weight) != len(self.data):
            raise ValueError(f"data_weight must have one weight a source, got {len(self.data_weight)} for {self.data}")
        for name in ("anneal_steps", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value > self.steps:
                raise ValueError(f"{name} must be at most steps, got {value} and {self.steps}")
        if self.global_batch_size is not None and self.accumulate != 1:
            raise ValueError(
                f"accumulate follows from global_batch_size and must not be given with it, got {self.accumulate} "
                f"and {self.global_batch_size}"
            )
        if self.bf16 and self.fp16:
            raise ValueError("one of bf16 and fp16 must be False, got both True")
        for idle, when, names in (
            (not self.sft, "without sft", ("prompt_column", "response_column", "messages_column", "padding")),
            (self.sft, "with sft", ("column", "context", "isolate_documents")),
            (self.lora_rank == 0, "with lora_rank 0", ("lora_alpha", "lora_dropout")),
        ):
            for name in names if idle else ():
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name} has no meaning {when}, got {getattr(self, name)!r}")
        if "shift" in self.objective:
            raise ValueError("shift must be given as a setting of its own, not in objective")
        if (self.teacher is not None) != (self.objective.get("distill_weight", 0) != 0):
            weight = self.objective.get("distill_weight", 0)
            raise ValueError(
                f"teacher and a distill_weight above 0 need each other, got {self.teacher!r} and {weight!r}"
            )

    # --- sources of settings ------------------------------------------------------------------------------------------

    @classmethod
    def resolve(
        cls, preset: str | None = None, path: str | Path | None = None, given: Mapping[str, Any] | None = None
    ) -> AdaptConfig:
        """A preset, changed by a YAML file, changed by what is ``given``; ValueError for an unknown key or value."""
        values: dict[str, Any] = {}
        if preset is not None:
            check_choice("preset", preset, tuple(PRESETS))
            values |= PRESETS[preset]
        for source, more in ((str(path), read_yaml(path) if path else {}), ("the arguments", given or {})):
            unknown = sorted(set(more) - {f.name for f in dataclasses.fields(cls)})
            if unknown:
                raise ValueError(f"{source}: no such setting: {', '.join(unknown)}")
            if "objective" in more and isinstance(more["objective"], dict):
                more = {**more, "objective": {**values.get("objective", {}), **more["objective"]}}
            values |= more
        return cls(**values)

    def to_yaml(self) -> str:
        """Text that ``resolve`` reads to an equal config."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)

    # --- what follows from them ---------------------------------------------------------------------------------------

    def mask_token_or_id(self) -> str | int | None:
        """For ``adapt``: digits are an id."""
        return int(self.mask_token) if self.mask_token and self.mask_token.isdecimal() else self.mask_token

    def shifted(self, of_model: bool | None = None) -> bool:
        """Whether row i predicts token i+1: as given, else as an adapted model does, else by the recipe, else yes."""
        by_recipe = RECIPES.get(self.objective.get("recipe", ""), {}).get("shift", True)
        return next(shift for shift in (self.shift, of_model, by_recipe) if shift is not None)

    def block_context(self, shift: bool) -> str:
        """Of the blocks: without the shift nothing is skipped, so nothing need be repeated."""
        return self.context or ("overlap" if shift else "none")

    def annealing_steps(self, *, is_adapted: bool = False) -> int:
        """From causal to bidirectional; an adapted model is there already."""
        default = 0 if is_adapted else self.steps // 3
        return default if self.anneal_steps is None else self.anneal_steps

    def objective_config(self, *, mask_id: int, shift: bool | None = None) -> ObjectiveConfig:
        """Of the trainer; ``shift`` None is :meth:`shifted`."""
        hints = get_type_hints(ObjectiveConfig) | {"recipe": str}
        unknown = sorted(str(key) for key in self.objective if key not in hints or key == "mask_id")
        if unknown:
            known = ", ".join(sorted(set(hints) - {"mask_id", "shift"}))
            raise ValueError(f"objective: no such setting: {', '.join(unknown)}; it has {known}")
        given = {name: _as_declared(f"objective {name}", value, hints[name]) for name, value in self.objective.items()}
        recipe = given.pop("recipe", None)
        given |= {"mask_id": mask_id, "shift": self.shifted() if shift is None else shift}
        return ObjectiveConfig(**given) if recipe is None else ObjectiveConfig.recipe(recipe, **given)

    def sft_columns(self) -> SftColumns:
        """Of the rows."""
        return SftColumns(self.prompt_column, self.response_column, self.messages_column)

    def accumulation(self, processes: int) -> int:
        """Forwards a step on each of so many processes."""
        if self.global_batch_size is None:
            return self.accumulate
        forwards, rest = divmod(self.global_batch_size, self.batch_size * processes)
        if rest or not forwards:
            raise ValueError(
                f"global_batch_size must be a multiple of batch_size times processes, got {self.global_batch_size}, "
                f"{self.batch_size} and {processes}"
            )
        return forwards

    def training_arguments(self, output_dir: str | Path, *, processes: int = 1, **more: Any) -> TrainingArguments:
        """Of transformers, for DiffusionTrainer; ``more`` are further fields of theirs."""
        from transformers import TrainingArguments  # seconds, which other commands need not wait for

        checkpointing = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
        more[f"{checkpointing}_checkpointing"] = self.activation_checkpointing
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation(processes),
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule,
            warmup_steps=max(1, self.steps // 20) if self.warmup_steps is None else self.warmup_steps,
            weight_decay=self.weight_decay,
            adam_beta2=self.adam_beta2,
            max_grad_norm=self.max_grad_norm,
            bf16=self.bf16,
            fp16=self.fp16,
            torch_compile=self.compile,
            ddp_find_unused_parameters=False,  # the loss runs in the forward and reaches every parameter
            save_strategy="steps",
            save_steps=self.save_steps or max(1, self.steps // 10),
            save_total_limit=self.save_total_limit,
            logging_steps=self.logging_steps or max(1, self.steps // 100),
            report_to=list(self.report_to) or "none",
            seed=self.seed,
            disable_tqdm=True,
            **more,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs the first; Trainer would use DataParallel
        return arguments


# [low, high] of the numbers, and which ends are open.
_INTERVALS: dict[str, tuple[Any, ...]] = {
    **{name: (1, MOST) for name in ("steps", "batch_size", "accumulate", "global_batch_size", "save_total_limit")},
    **{name: (1, MOST) for name in ("save_steps", "eval_steps", "logging_steps", "lora_alpha")},
    **{name: (0, MOST) for name in ("anneal_steps", "warmup_steps", "lora_rank")},
    **{name: (0.0, math.inf, "high") for name in ("weight_decay", "max_grad_norm")},
    **{name: (0.0, math.inf, "low", "high") for name in ("learning_rate", "data_weight")},
    **{name: (0.0, 1.0, "high") for name in ("adam_beta2", "lora_dropout")},
    "heldout": (0.0, 1.0, "low", "high"),
    "length": (2, MOST),
    "seed": (0, 2**32 - 1),
}
_CHOICES = {"schedule": SCHEDULES, "context": CONTEXTS, "padding": PADDINGS, "device": DEVICES}


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML readers silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """See the class."""
        own = (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge")
        keys = [str(self.construct_object(key, deep=True)).replace("-", "_") for key in own]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"given more than once: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a file, dashes in keys as underscores; ValueError where it is no YAML mapping."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML of settings: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings as `name: value`, got {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _as_declared(name: str, value: Any, kind: Any) -> Any:
    """``value`` of YAML as the field's type (1e-4 is a text to YAML); ValueError where it is another."""
    if kind in (tuple[str, ...], tuple[float, ...]):
        value = [] if value is None else [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_as_declared(name, item, kind.__args__[0]) for item in value)
    options = getattr(kind, "__args__", (kind,)) if kind != dict[str, Any] else (dict,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    given = type(value)
    if given is wanted:
        return value
    if wanted is str and given is int:
        return str(value)
    if wanted is float and given in (int, str):
        with suppress(ValueError):
            return float(value)
    raise ValueError(f"{name} must be {wanted.__name__}, got {value!r}")


# The paper's settings (Gong et al., ICLR 2025) but for the data; a step's batch holds for any number of GPUs.
_GPT2: dict[str, Any] = {"learning_rate": 3e-4, "warmup_steps": 2000, "anneal_steps": 10_000, "bf16": True}
PRESETS: dict[str, dict[str, Any]] = {
    "diffugpt-s": _GPT2
    | {"model": "gpt2", "mask_token": "10541", "length": 512, "objective": {"recipe": "diffullama"}}
    | {"steps": 1_000_000, "batch_size": 32, "global_batch_size": 256},
    "diffugpt-m": _GPT2
    | {"model": "gpt2-medium", "length": 1024, "objective": {"recipe": "diffullama"}}  # its mask token is a new one
    | {"steps": 160_000, "batch_size": 16, "global_batch_size": 1280},
    "diffullama-7b": {"model": "meta-llama/Llama-2-7b-hf", "mask_token": "811", "length": 2048}
    | {"objective": {"recipe": "diffullama"}, "anneal_steps": 0, "bf16": True, "activation_checkpointing": True}
    | {"learning_rate": 2e-5, "schedule": "constant_with_warmup", "weight_decay": 0.1, "adam_beta2": 0.95}
    | {"steps": 20_000, "batch_size": 60, "global_batch_size": 60 * 4 * 64},
    "quick": {"steps": 20, "batch_size": 4, "length": 16, "learning_rate": 1e-3, "heldout": 0.1},
}
