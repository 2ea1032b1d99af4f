# SPDX-License-Identifier: Apache-2.0
"""The training objective: draw t, noise, run the model under its attention mask, score what was noised.

``docs/objective.md`` has the formula of every choice of :class:`ObjectiveConfig`.
"""

from .config import RECIPES, ObjectiveConfig
from .loss import DiffusionObjective, NoisedBatch, ObjectiveOutput
from .time import draw_t

__all__ = ["RECIPES", "DiffusionObjective", "NoisedBatch", "ObjectiveConfig", "ObjectiveOutput", "draw_t"]
