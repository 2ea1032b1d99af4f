# SPDX-License-Identifier: Apache-2.0
"""Policies by name: registration, parameters, and what is refused."""

import math
from dataclasses import dataclass

import pytest
from straight_line import MASK, VOCAB, one_row

from diffullama_ext.sampling import (
    POLICIES,
    ConfidencePolicy,
    Decision,
    Policy,
    RandomPolicy,
    ThresholdPolicy,
    fill,
    make_policy,
    policy_parameters,
    register,
)
from diffullama_ext.sampling.policies import registry


def test_a_policy_of_ones_own_gets_a_name(context_denoiser, monkeypatch):
    monkeypatch.setattr(registry, "POLICIES", dict(POLICIES))

    @register("leftmost")
    @dataclass(frozen=True)
    class Leftmost(Policy):
        """The first masked positions."""

        at_once: int = 1

        def decide(self, stats, state):
            return Decision(state.active & (state.active.cumsum(1) <= self.at_once))

    xt, masked = one_row(9)
    order = []
    policy = make_policy("leftmost", at_once=2)
    fill(
        context_denoiser(VOCAB),
        xt,
        masked,
        mask_id=MASK,
        policy=policy,
        on_step=lambda state, stats, decision: order.append(decision.commit[0].nonzero().flatten().tolist()),
    )
    assert order == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert policy_parameters("leftmost") == {"at_once": 1}
    with pytest.raises(ValueError, match=r"policy 'leftmost' is registered already, as Leftmost"):
        register("leftmost")(Leftmost)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_where_it_is_from_and_what_it_takes(name):
    """Its source, a default for every parameter, and each parameter rejected where it makes no sense."""
    assert "Source:" in POLICIES[name].__doc__ or (name in ("margin", "entropy") and "Dream" in POLICIES[name].__doc__)
    for parameter, default in policy_parameters(name).items():
        assert isinstance(default, (int, float, str, type(None)))
        if isinstance(default, (int, float)):
            with pytest.raises((TypeError, ValueError), match=f"{parameter} must be"):
                make_policy(name, **{parameter: math.nan if isinstance(default, float) else -1})
        if isinstance(default, str):
            with pytest.raises(ValueError, match=f"{parameter} must be one of"):
                make_policy(name, **{parameter: "best"})


def test_policies_by_name():
    assert make_policy("random") == RandomPolicy()
    assert make_policy("confidence", confidence="sample_prob") == ConfidencePolicy("sample_prob")
    assert make_policy("threshold", threshold=0.5) == ThresholdPolicy(0.5)
    assert all(isinstance(make_policy(name), Policy) for name in POLICIES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_policy("best"), r"policy must be one of '.*'threshold'.*, got 'best'"),
        (
            lambda: make_policy("threshold", tau=0.5),
            r"policy 'threshold' has the parameters \['threshold', 'confidence'\], got 'tau'",
        ),
        (lambda: make_policy("random", threshold=0.5), r"policy 'random' has the parameters \[\], got 'threshold'"),
        (lambda: ThresholdPolicy(-0.1), r"threshold must be in \[0, inf\], got -0.1"),
        (lambda: ThresholdPolicy(math.nan), r"threshold must be in \[0, inf\], got nan"),
        (lambda: ThresholdPolicy(confidence="p1"), r"confidence must be one of 'prob', 'sample_prob', got 'p1'"),
        (lambda: ConfidencePolicy("entropy"), r"confidence must be one of 'prob', 'sample_prob', got 'entropy'"),
    ],
    ids=["unknown", "parameter", "no-parameters", "negative", "nan", "p1", "entropy"],
)
def test_rejects_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
