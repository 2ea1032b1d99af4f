# SPDX-License-Identifier: Apache-2.0
"""Every CUDA op on small odd shapes, for `compute-sanitizer --tool memcheck python -m benchmarks.gpu_sanitize`.

Inputs are made on the host and copied, so that initcheck sees them written whichever kernels it watches.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

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
from diffullama_ext.benchmarking import running
from diffullama_ext.ops import attention_hopper

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Inputs:
    """Random tensors on the device, by way of the host."""

    def __init__(self, device: str) -> None:
        self.device = device

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape).to(self.device)

    def bits(self, *shape: int) -> Tensor:
        return (torch.rand(shape) < 0.5).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape).to(self.device)

    def normal(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(self.device).requires_grad_()


# Each family makes its calls one after the other and yields the name of the one that it made.


def noising(i: Inputs) -> Iterator[str]:
    for B, L in ((3, 65), (1, 1), (2, 4100)):
        mask_tokens(i.ids(90, B, L), i.uniform(B), mask_id=99, maskable=i.bits(B, L), seed=1)
        yield f"mask_tokens {B}x{L}"
        mask_tokens(i.ids(90, B, L), i.uniform(B, L), mask_id=99, seed=1)
        yield f"mask_tokens {B}x{L}, p by token"


def masks(i: Inputs) -> Iterator[str]:
    ops = torch.ops.diffullama
    for length in (33, 70, 256):
        words = AttentionMask.annealed(length, i.uniform(1), seed=2).words
        yield f"annealed_mask {length}"
        AttentionMask.from_dense(i.bits(2, length, length)).to_dense()
        yield f"pack_mask, unpack_mask {length}"
        AttentionMask.block_causal(i.ids(5, 2, length))
        AttentionMask.documents(i.ids(3, 2, length))
        yield f"id_mask {length}"
        for transpose in (False, True):
            ops.fragment_mask.default(words, length, transpose)
            yield f"fragment_mask {length}, transpose {transpose}"
        ops.mask_tile_classes.default(words, length, 64, 128)
        yield f"mask_tile_classes {length}"


def attentions(i: Inputs) -> Iterator[str]:
    for dtype, D in product(FLOATS[1:], (32, 64, 96, 128, 256)):
        for B, H, Hkv, Lq, Lk in ((2, 4, 2, 70, 70), (1, 2, 2, 5, 300), (1, 2, 1, 300, 130)):
            q, k, v = i.normal(dtype, B, H, Lq, D), i.normal(dtype, B, Hkv, Lk, D), i.normal(dtype, B, Hkv, Lk, D)
            for mask in (None, AttentionMask.from_dense(i.bits(B, Lq, Lk))):
                for order in (False, True):
                    attention(q, k, v, mask, key_padding=i.bits(B, Lk), deterministic=order).sum().backward()
                    bits = "no mask" if mask is None else "bits"
                    yield f"attention {B}x{H}x{Lq}x{Lk}x{D} {dtype}, {bits}, deterministic {order}"
            if Lq == Lk:
                attention(q, k, v, AttentionMask.causal(Lq, device=i.device)).sum().backward()
                yield f"attention {B}x{H}x{Lq}x{Lk}x{D} {dtype}, causal"


def hopper_attentions(i: Inputs) -> Iterator[str]:
    """The ops themselves, where there are any."""
    if not attention_hopper.runs_on(torch.device(i.device)):
        return
    for dtype, D in product(FLOATS[1:], attention_hopper.WIDTHS):
        for B, H, Hkv, Lq, Lk in ((2, 4, 2, 70, 70), (1, 2, 2, 5, 700), (1, 2, 1, 300, 130)):
            q, k, v = (i.normal(dtype, B, h, n, D) for h, n in ((H, Lq), (Hkv, Lk), (Hkv, Lk)))
            mask, padding = AttentionMask.from_dense(i.bits(B, Lq, Lk)), i.bits(B, Lk)
            bits = (mask.words, mask.fragments(), mask.tile_classes(64, 64))
            for given, causal in ((bits, False), ((None, None, None), False), ((None, None, None), True)):
                for order in (False, True):
                    attention_hopper.attention(q, k, v, *given, padding, causal, 0.1, order)[0].sum().backward()
                    name = f"{'bits' if given is bits else causal}, deterministic {order}"
                    yield f"attention_hopper {B}x{H}x{Lq}x{Lk}x{D} {dtype}, {name}"


def losses(i: Inputs) -> Iterator[str]:
    B, L, H = 2, 19, 24
    for dtype, V in product(FLOATS, (1001, 4096)):
        x0, masked, weight = i.ids(V, B, L), i.bits(B, L), 1 + i.uniform(B)
        hidden, head, bias = i.normal(dtype, B, L, H), i.normal(dtype, V, H), i.normal(dtype, V)
        logits = i.normal(dtype, B, L, V)
        shifted_cross_entropy(logits, x0, masked, loss_weight=weight, softcap=20.0)[0].backward()
        yield f"shifted_cross_entropy V={V} {dtype}"
        for reduction, bound in (("mean", B * L), ("mean", None), ("none", None)):  # rows past the count are padding
            options: dict[str, Any] = {"bias": bias, "loss_weight": weight, "label_smoothing": 0.1, "chunk_rows": 7}
            loss, _ = linear_shifted_cross_entropy(
                hidden, head, x0, masked, **options, reduction=reduction, max_scored=bound
            )
            loss.sum().backward()
            yield f"linear_shifted_cross_entropy V={V} {dtype} {reduction}, bound {bound}"
        token_log_probs(hidden, head, x0, masked)
        yield f"token_log_probs V={V} {dtype}"


def sampling(i: Inputs) -> Iterator[str]:
    truncated = {"temperature": 0.9, "top_p": 0.9}
    draws: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 5}, truncated)
    for dtype, (N, V) in product(FLOATS, ((3, 1003), (2, 40000), (2, 151936))):
        logits = 4 * i.normal(dtype, N, V)
        for draw in draws:
            token_stats(logits, seed=3, forbid=7, current=i.ids(V, N), **draw)
            yield f"token_stats {N}x{V} {dtype} {draw}"
    amounts = {"quota": 5.0, "threshold": 0.8, "factor": 1.0, "random": 0.3}
    for (rule, amount), (B, L) in product(amounts.items(), ((3, 65), (1, 9001))):
        confidence, amounts_B = i.uniform(B, L), torch.full((B,), amount).to(i.device)
        unmask(i.ids(90, B, L), i.bits(B, L), i.ids(90, B, L), confidence, amounts_B, rule=rule, seed=4)
        yield f"unmask {rule} {B}x{L}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Call everything; an exception ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args(arguments).device
    torch.manual_seed(0)
    with running("ext"):
        for family in (noising, masks, attentions, hopper_attentions, losses, sampling):
            for name in family(Inputs(device)):
                if device == "cuda":
                    torch.cuda.synchronize()
                print(name, flush=True)


if __name__ == "__main__":
    main()
