# SPDX-License-Identifier: Apache-2.0
"""`diffullama adapt`: an autoregressive model becomes a masked diffusion model by training on the user's text."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..adapt_config import PRESETS, AdaptConfig
from .errors import BadInput, checking_input


def adapt(**given: Any) -> None:
    """Adapt a causal language model to masked diffusion.

    Settings come from --preset, then --config, then flags; each overrides those before. OUT gets the settings and the
    versions of packages at once, checkpoints while training, and at the end the model in its own architecture (plain
    transformers loads it), the tokenizer, metrics.json (held-out figures before and after, with the same noise) and
    curves.json. The same command again continues a run that was cut off. Several GPUs: torchrun or accelerate launch.
    """
    from .adapt_run import run_adaptation

    out, preset, path = given.pop("out"), given.pop("preset"), given.pop("config")
    with checking_input():
        flags = {name: value for name, value in given.items() if value is not None and value != []}
        if "objective" in flags:
            flags["objective"] = _key_values(flags["objective"])
        config = AdaptConfig.resolve(preset, path, flags)
        for name in ("model", "data"):
            if not getattr(config, name):
                raise BadInput(f"--{name} must be given")
    run_adaptation(config, out, processes=int(os.environ.get("WORLD_SIZE", "1")))


def _key_values(pairs: list[str]) -> dict[str, Any]:
    """Of "key=value" flags, each value as YAML reads it."""
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key in values:
            raise BadInput(f"--objective must give each key once, got {key} again in {pair!r}")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise BadInput(f"--objective must be key=value, got {pair!r}")
    return values


def _flag_type(kind: Any) -> Any:
    """What typer parses for a field of AdaptConfig; None stands for a flag that is not given."""
    if kind == dict[str, Any]:
        return list[str] | None
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]] | None  # type: ignore[misc]
    return kind | None


def _with_flags(command: Any) -> Any:
    """``command`` with one flag for each field of AdaptConfig, so that flags and YAML cannot drift apart."""
    presets = ", ".join(PRESETS)
    flags: dict[str, Any] = {
        "out": (Path, "Folder of the run: new, empty, or of this very run, which then goes on."),
        "preset": (str | None, f"Settings to start from: {presets}."),
        "config": (Path | None, "YAML file of settings, named as the flags."),
    }
    hints = get_type_hints(AdaptConfig)
    flags |= {f.name: (_flag_type(hints[f.name]), f.metadata["help"]) for f in fields(AdaptConfig)}
    parameters = []
    for name, (kind, text) in flags.items():
        default = inspect.Parameter.empty if name == "out" else None
        annotation: Any = Annotated[kind, typer.Option(help=text)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(_with_flags(adapt))
