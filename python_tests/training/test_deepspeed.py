# SPDX-License-Identifier: Apache-2.0
"""The shipped DeepSpeed configuration on two CPU processes (`make test-extras`; skipped without deepspeed)."""

from pathlib import Path

import pytest
from launching import assert_same_run, demo_model, launch, one_process

pytest.importorskip("deepspeed")


def test_zero2_is_one_process_and_goes_on(tmp_path: Path) -> None:
    """With accumulation; then a run that was cut off after its first checkpoint."""
    demo_model(tmp_path)
    one_process(tmp_path, "one")
    launch(tmp_path, "deepspeed_zero2", "two")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    launch(tmp_path, "deepspeed_zero2", "cut", killed_at=5, fails=True)
    launch(tmp_path, "deepspeed_zero2", "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "one")
