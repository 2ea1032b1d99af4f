# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public functions: one message form, "<name> must be <needed>, got <given>"."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _given(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"{value!r}"


def _needed(dtypes: Sequence[torch.dtype], shape: Sequence[int | str] | None) -> str:
    names = "/".join(str(d).removeprefix("torch.") for d in dtypes)
    return names if shape is None else f"{names}[{', '.join(map(str, shape))}]"


def check_tensor(
    name: str,
    value: object,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str] | None = None,
    device: torch.device | None = None,
) -> None:
    """Dtype (TypeError), shape and device (ValueError). A str in ``shape`` names a free dimension."""
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {_needed(dtypes, shape)}, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor; pass a plain tensor (gather it where the module is unsharded)")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_needed(dtypes, shape)}, got {_given(value)}")
    if shape is not None:
        matches = value.dim() == len(shape) and all(
            isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
        )
        if not matches:
            raise ValueError(f"{name} must be {_needed(dtypes, shape)}, got {_given(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {_given(value)}")


def check_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> None:
    """A Python number inside [low, high], without an end that is open; NaN never is. TypeError for no number."""
    try:
        inside = (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not inside:
        ends = [str(end) if isinstance(end, int) else f"{end:g}" for end in (low, high)]
        interval = f"{'(' if low_open else '['}{', '.join(ends)}{')' if high_open else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """A Python int (no bool, no float; a traced one is one) inside [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    check_range(name, cast(float, value), low, high)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of the named choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def as_scalar_tensor(name: str, value: int | float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, or a one-element tensor already on ``device``, as a [1] tensor; tensors are never synchronised."""
    if isinstance(value, Tensor):
        check_tensor(name, value, dtype, device=device)
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got {_given(value)}")
        return value.reshape(1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {type(value).__name__}")
    if dtype == torch.int64 and not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if dtype == torch.int64 and not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must fit 64 bits, got {value}")
    if isinstance(value, int) and value >= 2**63:
        value -= 2**64  # the same 64 bits
    return torch.full((1,), value, dtype=dtype, device=device)
