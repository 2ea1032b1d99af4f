# SPDX-License-Identifier: Apache-2.0
"""Comparisons, awkward memory layouts and recompile counting shared by the op tests."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend


class BadInput(NamedTuple):
    """One rejected argument of a public function."""

    argument: str
    value: Callable[[str], object]  # device -> the bad value
    error: type[Exception]
    message: str  # regex

    def check(self, call: Callable[..., object], arguments: dict[str, object], device: str) -> None:
        call(**arguments)  # the rest is accepted
        with pytest.raises(self.error, match=self.message):
            call(**(arguments | {self.argument: self.value(device)}))


def zeros(dtype: torch.dtype, *shape: int) -> Callable[[str], Tensor]:
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


def elsewhere(dtype: torch.dtype, *shape: int) -> Callable[[str], Tensor]:
    """On a device that is neither the CPU nor CUDA, so that the check can be seen anywhere."""
    return lambda _device: torch.zeros(shape, dtype=dtype, device="meta")


def bad_inputs(*rows: tuple[str, Callable[[str], object], type[Exception], str]) -> pytest.MarkDecorator:
    """Parametrizes ``bad`` over (argument, device -> bad value, exception, message regex)."""
    cases = [BadInput(*row) for row in rows]
    return pytest.mark.parametrize("bad", cases, ids=[f"{c.argument}: {c.message[:48]}" for c in cases])


def assert_no_worse_than_torch(out: Tensor, truth: Tensor, torch_low: Tensor, noise: float = 0.0) -> None:
    """The error against float64 truth may be at most twice what plain PyTorch makes in the same dtype.

    Where plain PyTorch happens to be exact, 8 float32 roundings of the largest value are allowed, and ``noise``.
    """
    assert torch.equal(out.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    error = (out.double() - truth)[finite].abs().max()
    allowed = 2.0 * (torch_low.double() - truth)[finite].abs().max() + 2.0**-20 * truth[finite].abs().max() + noise
    assert error <= allowed, f"max error {error:.3e}, allowed {allowed:.3e}"


def strided(tensor: Tensor) -> Tensor:
    """The same values in memory that is contiguous in no dimension: every other element of a transposed buffer."""
    buffer = torch.zeros([2 * n for n in reversed(tensor.shape)], dtype=tensor.dtype, device=tensor.device)
    view = buffer.permute(*reversed(range(tensor.dim())))[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


def compiled_frames(function: Callable[..., object], calls: Iterable[tuple], check: Callable[..., None]) -> int:
    """Frames that torch.compile(fullgraph=True) makes of ``function`` over ``calls``; check(got, eager) after each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for arguments in calls:
        check(compiled(*arguments), function(*arguments))
    return counter.frame_count


def assert_all_equal(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Bit for bit, NaN included."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (
            torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)) if a.is_floating_point() else torch.equal(a, b)
        )
