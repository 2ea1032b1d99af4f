# SPDX-License-Identifier: Apache-2.0
"""Training on transformers.Trainer."""

from .collator import DiffusionCollator
from .numbering import NumberedDataset, NumberedSampler
from .trainer import DiffusionTrainer

__all__ = ["DiffusionCollator", "DiffusionTrainer", "NumberedDataset", "NumberedSampler"]
