# SPDX-License-Identifier: Apache-2.0
"""Sampling by unmasking: :func:`generate` and :func:`infill` with an adapted model, :func:`fill` with any denoiser."""

from .chat import ChatOutput, chat
from .denoisers import Denoiser, Guided, ModelDenoiser, RowDenoiser
from .generate import SampleOutput, generate
from .infill import InfillOutput, infill, parse_spans
from .logits_hooks import Forbidden, Forced, LogitsHook
from .loop import Filled, StepHook, fill
from .page import trace_page, write_page
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
from .token_text import token_text
from .trace import History, Trace

__all__ = [
    "POLICIES",
    "ChatOutput",
    "ConfidencePolicy",
    "Decision",
    "Denoiser",
    "Filled",
    "Forbidden",
    "Forced",
    "Guided",
    "History",
    "InfillOutput",
    "LogitsHook",
    "ModelDenoiser",
    "Policy",
    "RandomPolicy",
    "RowDenoiser",
    "SampleOutput",
    "Scored",
    "State",
    "StepHook",
    "ThresholdPolicy",
    "Trace",
    "chat",
    "fill",
    "generate",
    "infill",
    "make_policy",
    "parse_spans",
    "policy_parameters",
    "register",
    "token_text",
    "trace_page",
    "write_page",
]
