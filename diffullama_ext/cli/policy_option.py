# SPDX-License-Identifier: Apache-2.0
"""`--policy NAME` or `--policy NAME:FIELD=VALUE,FIELD=VALUE`: the registered policies, as an option and in --help."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from ..sampling import Policy

_TRUE_FALSE = {"true": True, "false": False}


def parse_policy(text: str) -> Policy:
    """The policy of an option's text.

    Raises:
        ValueError: no such policy or parameter, or a value that is not of the parameter's type or range.
    """
    from ..sampling import POLICIES, make_policy

    name, colon, rest = text.partition(":")
    if name not in POLICIES:
        return make_policy(name)  # which says so
    kinds = typing.get_type_hints(POLICIES[name])
    values: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        field, equals, value = (part.strip() for part in item.partition("="))
        if not field or not equals:
            raise ValueError(f"--policy must be NAME or NAME:FIELD=VALUE,FIELD=VALUE, got {text!r}")
        if field in values:
            raise ValueError(f"--policy has {field!r} twice: {text!r}")
        values[field] = _parsed(f"{name}:{field}", value, kinds.get(field, str))
    return make_policy(name, **values)


def _parsed(name: str, text: str, kind: Any) -> Any:
    """A value of a parameter's type: bool, int, float, str, or None ("none")."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text.lower() == "none" and types.NoneType in typing.get_args(kind):
            return None
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
    if kind is bool:
        if text.lower() not in _TRUE_FALSE:
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return _TRUE_FALSE[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be {kind.__name__}, got {text!r}") from None


def policy_lines() -> list[tuple[str, str]]:
    """(name with its parameters and their defaults, first line of its description) of every registered policy."""
    from ..sampling import POLICIES

    lines = []
    for name, policy in POLICIES.items():
        parameters = ",".join(
            field.name if field.default is MISSING else f"{field.name}={_shown(field.default)}"
            for field in fields(policy)  # type: ignore[arg-type]
        )
        summary = (policy.__doc__ or "").strip().split("\n\n")[0]
        lines.append((f"{name}:{parameters}" if parameters else name, " ".join(summary.split())))
    return lines


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


class SamplingCommand(TyperCommand):
    """A command whose --help ends in the policies; they are looked up only then."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Click's hook: a list of definitions."""
        with formatter.section("Policies (--policy NAME:FIELD=VALUE,FIELD=VALUE; FIELD=DEFAULT here)"):
            formatter.write_dl(policy_lines())
