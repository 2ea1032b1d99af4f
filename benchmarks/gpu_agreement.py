# SPDX-License-Identifier: Apache-2.0
"""Whether two contenders computed the same: a wrong result gets no number. Random ones agree in law."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SIGMAS = 5.0
LOSS_ERROR = 2e-2  # of bfloat16 gradients against bfloat16 gradients, in the Frobenius norm


def agree(op: str, shape: Mapping[str, Any], ours: Any, peer: Any) -> None:
    """AssertionError, with the figures, where they do not."""
    _CHECKS[op](shape, ours, peer)


def _counts(shape: Mapping[str, Any], ours: Any, peer: Any) -> None:
    masked = [int(result[1].sum()) for result in (ours, peer)]
    allowed = SIGMAS * (ours[1].numel() / 4) ** 0.5 * 2**0.5
    assert abs(masked[0] - masked[1]) <= allowed, f"{masked[0]} and {masked[1]} tokens masked"


def _open_entries(shape: Mapping[str, Any], ours: Tensor, peer: Tensor) -> None:
    bits = torch.arange(32, device=ours.device, dtype=torch.int32)
    opened = [sum(int(((row[..., None] >> bits) & 1).sum()) for row in ours[0].split(256)), int(peer.sum())]
    allowed = SIGMAS * (peer.numel() / 4) ** 0.5 * 2**0.5
    assert abs(opened[0] - opened[1]) <= allowed, f"{opened[0]} and {opened[1]} entries open"


def _drawn(shape: Mapping[str, Any], ours: Any, peer: Any) -> None:
    """Greedy tokens may differ where logits tie; their probabilities may not."""
    probabilities = [ours.prob.double(), peer[1].double()]
    if shape["temperature"] == 0:
        torch.testing.assert_close(probabilities[0], probabilities[1], rtol=1e-2, atol=1e-6)
        return
    logs = [p.clamp_min(1e-30).log() for p in probabilities]
    spread = torch.cat(logs).std() * (2 / logs[0].numel()) ** 0.5
    means = [float(log.mean()) for log in logs]
    assert abs(means[0] - means[1]) <= SIGMAS * float(spread), f"mean log-probabilities {means[0]} and {means[1]}"


def _committed(shape: Mapping[str, Any], ours: Any, peer: Any) -> None:
    assert torch.equal(ours[2], peer[2]), "other numbers remain"
    differing = int((ours[1] != peer[1]).sum())
    assert differing <= 2 * ours[1].shape[0], f"{differing} positions differ"  # ties at the cut


def _losses(shape: Mapping[str, Any], ours: Any, peer: Any) -> None:
    for name, a, b in zip(("loss", "dhidden", "dweight"), ours, peer, strict=True):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        assert error <= LOSS_ERROR, f"{name} differs by {error:.2e}"  # a NaN fails


def _attended(shape: Mapping[str, Any], ours: Any, peer: Any) -> None:
    pairs = zip(("dq", "dk", "dv"), ours, peer, strict=True) if isinstance(ours, tuple) else [("out", ours, peer)]
    for name, a, b in pairs:
        error = float((a.float() - b.float()).norm() / b.float().norm())
        assert error <= LOSS_ERROR, f"{name} differs by {error:.2e}"


_CHECKS: Mapping[str, Callable[[Mapping[str, Any], Any, Any], None]] = {
    "mask_tokens": _counts,
    "annealed_mask": _open_entries,
    "token_stats": _drawn,
    "unmask": _committed,
    "linear_shifted_cross_entropy": _losses,
    "attention": _attended,
    "attention_backward": _attended,
}
