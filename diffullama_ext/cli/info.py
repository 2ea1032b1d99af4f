# SPDX-License-Identifier: Apache-2.0
"""`diffullama info`: what is compiled and what is running, to paste into an issue."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

PACKAGES = ("transformers", "tokenizers", "datasets", "accelerate", "peft", "nvidia-cutlass")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, compiled kernels and devices."""
    from .._library import build_info
    from .._version import __version__

    facts: dict[str, object] = {
        "diffullama-ext": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **build_info(),
        **{package: _version(package) for package in PACKAGES},
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")
