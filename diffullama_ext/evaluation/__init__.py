# SPDX-License-Identifier: Apache-2.0
"""Held-out figures with standard errors, comparable between models: the noise is fixed."""

from .autoregressive import autoregressive_loss
from .diffusion import DiffusionScores, EvaluationConfig, diffusion_scores
from .estimate import Estimate

__all__ = ["DiffusionScores", "Estimate", "EvaluationConfig", "autoregressive_loss", "diffusion_scores"]
