# SPDX-License-Identifier: Apache-2.0
"""Which of the drawn tokens a step commits: one small class a policy, one file a family.

A new policy is a class in a file of its own under ``@register("name")``; a file of this package is also imported below.
"""

from .base import CONFIDENCES, Policy
from .entropy_budget import EntropyBudgetPolicy
from .history import AHDPolicy, KLASSPolicy
from .p2 import P2Policy
from .prophet import ProphetPolicy
from .quota import ConfidencePolicy, EntropyPolicy, MarginPolicy
from .random_order import AncestralPolicy, FirstHittingPolicy, RandomPolicy
from .registry import POLICIES, as_policy, make_policy, policy_parameters, register
from .remdm import ReMDMPolicy
from .saber import SaberPolicy
from .threshold import FactorPolicy, ThresholdPolicy
from .wino import WINOPolicy

__all__ = [
    "CONFIDENCES",
    "POLICIES",
    "AHDPolicy",
    "AncestralPolicy",
    "ConfidencePolicy",
    "EntropyBudgetPolicy",
    "EntropyPolicy",
    "FactorPolicy",
    "FirstHittingPolicy",
    "KLASSPolicy",
    "MarginPolicy",
    "P2Policy",
    "Policy",
    "ProphetPolicy",
    "RandomPolicy",
    "ReMDMPolicy",
    "SaberPolicy",
    "ThresholdPolicy",
    "WINOPolicy",
    "as_policy",
    "make_policy",
    "policy_parameters",
    "register",
]
