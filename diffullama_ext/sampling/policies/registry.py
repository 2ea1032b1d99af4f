# SPDX-License-Identifier: Apache-2.0
"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ...checks import check_choice
from .base import Policy

POLICIES: dict[str, type[Policy]] = {}

PolicyClass = TypeVar("PolicyClass", bound=type[Policy])


def register(name: str) -> Callable[[PolicyClass], PolicyClass]:
    """Class decorator: a frozen dataclass becomes the policy ``name``; ValueError where the name is taken."""

    def add(policy: PolicyClass) -> PolicyClass:
        if name in POLICIES:
            raise ValueError(f"policy {name!r} is registered already, as {POLICIES[name].__name__}")
        POLICIES[name] = policy
        return policy

    return add


def policy_parameters(name: str) -> dict[str, Any]:
    """Parameters of a policy and their defaults, in order; ``dataclasses.MISSING`` where it has none.

    Raises:
        ValueError: no such policy.
    """
    check_choice("policy", name, tuple(POLICIES))
    parameters = fields(POLICIES[name])  # type: ignore[arg-type]
    return {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in parameters}


def make_policy(name: str, **parameters: object) -> Policy:
    """A policy by name, with parameters of its class.

    Raises:
        ValueError: no such policy, or it has no such parameter; from the policy itself, a value out of range.
    """
    known = list(policy_parameters(name))
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"policy {name!r} has the parameters {known}, got {parameter!r}")
    return POLICIES[name](**parameters)


def as_policy(policy: str | Policy) -> Policy:
    """A name with its defaults, or the policy itself."""
    if isinstance(policy, str):
        return make_policy(policy)
    if isinstance(policy, type) or not isinstance(policy, Policy):
        raise TypeError(f"policy must be one of {', '.join(map(repr, POLICIES))} or a Policy, got {policy!r}")
    return policy
