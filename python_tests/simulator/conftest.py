# SPDX-License-Identifier: Apache-2.0
"""What the simulator's tests compile once."""

import ctypes
from pathlib import Path

import pytest
from host_compiler import CSRC, VARIANTS, build


def _sources(folder: str) -> list[str]:
    return sorted(str(path.relative_to(CSRC)) for path in (CSRC / "testing" / folder).glob("*.cu"))


@pytest.fixture(scope="session")
def checks() -> ctypes.CDLL:
    """csrc/testing/checks as a library."""
    return ctypes.CDLL(str(build(_sources("checks"), shared=True)))


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Plain, watched by AddressSanitizer and UBSan, or by ThreadSanitizer."""
    return str(request.param)


@pytest.fixture(scope="session")
def faults(variant: str) -> Path:
    """csrc/testing/faults as a program."""
    return build(_sources("faults"), variant)
