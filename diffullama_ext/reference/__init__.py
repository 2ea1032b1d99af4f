# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch, written to be read: the oracle of the tests, the baseline, the fallback without a build."""

from . import attention, attention_mask, noising, philox, shifted_cross_entropy, unmasking

__all__ = ["attention", "attention_mask", "noising", "philox", "shifted_cross_entropy", "unmasking"]
