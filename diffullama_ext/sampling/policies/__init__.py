# SPDX-License-Identifier: Apache-2.0
"""Which of the drawn tokens a step commits: one small class a policy, one file a family.

A new policy is a class in a file of its own under ``@register("name")``; a file of this package is also imported below.
"""

from .base import CONFIDENCES, Policy
from .entropy_budget import EntropyBudgetPolicy
from .quota import ConfidencePolicy, EntropyPolicy, MarginPolicy
from .random_order import AncestralPolicy, FirstHittingPolicy, RandomPolicy
from .registry import POLICIES, as_policy, make_policy, policy_parameters, register
from .threshold import FactorPolicy, ThresholdPolicy

__all__ = [
    "CONFIDENCES",
    "POLICIES",
    "AncestralPolicy",
    "ConfidencePolicy",
    "EntropyBudgetPolicy",
    "EntropyPolicy",
    "FactorPolicy",
    "FirstHittingPolicy",
    "MarginPolicy",
    "Policy",
    "RandomPolicy",
    "ThresholdPolicy",
    "as_policy",
    "make_policy",
    "policy_parameters",
    "register",
]
