# SPDX-License-Identifier: Apache-2.0
"""No op waits for the device: torch raises where anything of its own would."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from diffullama_ext import (
    AttentionMask,
    attention,
    linear_shifted_cross_entropy,
    mask_tokens,
    shifted_cross_entropy,
    token_log_probs,
    token_stats,
    unmask,
)

pytestmark = [pytest.mark.cuda, pytest.mark.ext]

B, L, H, V = 3, 65, 32, 1003


@contextmanager
def no_synchronisation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, device="cuda")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").requires_grad_()


def linear(hidden: Tensor, weight: Tensor, x0: Tensor, masked: Tensor, max_scored: int | None) -> None:
    loss, _ = linear_shifted_cross_entropy(hidden, weight, x0, masked, max_scored=max_scored)
    loss.backward()


def attend(qkv: Tensor, mask: AttentionMask, key_padding: Tensor) -> None:
    out = attention(*qkv, mask, key_padding=key_padding)
    assert isinstance(out, Tensor)
    out.sum().backward()


def calls() -> dict[str, Callable[[], object]]:
    x0, masked, p = ids(V, B, L), ids(2, B, L).bool(), torch.rand(B, device="cuda")
    logits, hidden, weight, rows = normal(B, L, V), normal(B, L, H), normal(V, H), torch.randn(B * L, V, device="cuda")
    confidence, ratio, dense = torch.rand(B, L, device="cuda"), torch.rand(1, device="cuda"), ids(2, L, L).bool()
    qkv = torch.randn(3, B, 2, L, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    made: dict[str, Callable[[], object]] = {
        "mask_tokens": lambda: mask_tokens(x0, p, mask_id=99, maskable=masked, seed=1),
        "mask_tokens, seed drawn": lambda: mask_tokens(x0, p, mask_id=99),
        "annealed, tensor": lambda: AttentionMask.annealed(L, ratio, seed=1).words,
        "annealed, number": lambda: AttentionMask.annealed(L, 0.3, seed=1, device="cuda").words,
        "causal": lambda: AttentionMask.causal(L, device="cuda").words,
        "documents": lambda: AttentionMask.documents(x0).words,
        "dense": lambda: AttentionMask.from_dense(dense).to_dense(),
        "attention": lambda: attend(qkv, AttentionMask.annealed(L, 0.3, seed=1, device="cuda"), masked),
        "shifted_cross_entropy": lambda: shifted_cross_entropy(logits, x0, masked)[0].backward(),
        "linear_shifted_cross_entropy": lambda: linear(hidden, weight, x0, masked, B * L),
    }
    draws = {"greedy": {"temperature": 0.0}, "whole": {}, "truncated": {"top_k": 9, "top_p": 0.9}}
    for name, draw in draws.items():
        made[f"token_stats, {name}"] = lambda draw=draw: token_stats(rows, seed=1, forbid=3, **draw)
    for rule in ("quota", "threshold", "factor", "random"):
        made[f"unmask, {rule}"] = lambda rule=rule: unmask(x0, masked, x0, confidence, p, rule=rule)
    return made


CALLS = (
    *("mask_tokens", "mask_tokens, seed drawn", "annealed, tensor", "annealed, number", "causal", "documents", "dense"),
    *("attention", "shifted_cross_entropy", "linear_shifted_cross_entropy"),
    *("token_stats, greedy", "token_stats, whole", "token_stats, truncated"),
    *("unmask, quota", "unmask, threshold", "unmask, factor", "unmask, random"),
)


@pytest.mark.parametrize("name", CALLS)
def test_an_op_waits_for_nothing(name: str) -> None:
    call = calls()[name]
    call()  # loads kernels, libraries and handles
    with no_synchronisation():
        call()


def test_the_loss_waits_where_it_has_no_bound() -> None:
    """The documented exception, and the proof that this file would see a wait."""
    hidden, weight, x0, masked = normal(B, L, H), normal(V, H), ids(V, B, L), ids(2, B, L).bool()
    linear(hidden, weight, x0, masked, None)
    with no_synchronisation():
        with pytest.raises(RuntimeError):
            linear(hidden, weight, x0, masked, None)
        with pytest.raises(RuntimeError):
            token_log_probs(hidden, weight, x0, masked)
