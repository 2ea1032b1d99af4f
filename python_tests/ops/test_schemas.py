# SPDX-License-Identifier: Apache-2.0
"""The native API as a whole: every op is known here, mutates nothing, and takes what changes each step as tensors."""

import pytest
import torch

pytestmark = pytest.mark.ext

# Each has its opcheck in this folder; a new schema is added here together with one.
OPS = {
    "mask_tokens",
    "pack_mask",
    "unpack_mask",
    "id_mask",
    "annealed_mask",
    "fragment_mask",
    "mask_tile_classes",
    "attention",
    "attention_backward",
    "attention_hopper",
    "attention_hopper_backward",
    "shifted_cross_entropy",
    "shifted_cross_entropy_backward",
    "linear_shifted_nll",
    "linear_shifted_nll_backward",
    "linear_shifted_cross_entropy",
    "token_stats",
    "unmask",
}
CHANGES_EACH_STEP = {"seed", "step", "p_mask", "attn_mask_ratio", "amount", "loss_weight", "sample_index", "row_index"}


def _schemas() -> dict[str, torch._C.FunctionSchema]:
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("diffullama::")]
    return {s.name.removeprefix("diffullama::"): s for s in schemas}


def test_every_op_is_listed() -> None:
    assert set(_schemas()) == OPS


@pytest.mark.parametrize("op", sorted(OPS))
def test_step_values_are_tensors_and_nothing_is_mutated(op: str) -> None:
    """An int or float there would recompile every step, and stale a captured graph."""
    schema = _schemas()[op]
    wrong = [a.name for a in schema.arguments if a.name in CHANGES_EACH_STEP and "Tensor" not in str(a.type)]
    assert not wrong
    assert not schema.is_mutable
