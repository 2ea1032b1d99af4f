# SPDX-License-Identifier: Apache-2.0
"""Sampling by unmasking: :func:`generate` and :func:`infill` with an adapted model, :func:`fill` with any denoiser."""

from .generate import ModelDenoiser, SampleOutput, generate
from .infill import InfillOutput, infill, parse_spans
from .loop import Denoiser, Filled, StepHook, fill
from .policies import (
    POLICIES,
    ConfidencePolicy,
    Policy,
    RandomPolicy,
    ThresholdPolicy,
    make_policy,
    policy_parameters,
    register,
)
from .state import Decision, Scored, State

__all__ = [
    "POLICIES",
    "ConfidencePolicy",
    "Decision",
    "Denoiser",
    "Filled",
    "InfillOutput",
    "ModelDenoiser",
    "Policy",
    "RandomPolicy",
    "SampleOutput",
    "Scored",
    "State",
    "StepHook",
    "ThresholdPolicy",
    "fill",
    "generate",
    "infill",
    "make_policy",
    "parse_spans",
    "policy_parameters",
    "register",
]
