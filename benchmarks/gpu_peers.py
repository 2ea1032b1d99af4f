# SPDX-License-Identifier: Apache-2.0
"""What each op is measured against on a GPU: the same task in eager PyTorch, compiled, and in other packages.

A peer takes the inputs of diffullama_ext.benchmarking.CASES.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_attention_peers import attention_peers
from diffullama_ext.benchmarking import gradients

Peer = Callable[..., Any]


def compiled(function: Peer) -> Peer:
    """torch.compile for the shape at hand, on the first call: it loads the compiler."""
    made: list[Peer] = []

    def run(*arguments: Any) -> Any:
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments)

    return run


# --- noising and masks -----------------------------------------------------------------------------------------------


def rand_where(i: Any) -> tuple[Tensor, ...]:
    masked = torch.rand(i.x0.shape, device=i.x0.device) < i.p_mask[:, None]
    return torch.where(masked, i.mask_id, i.x0), masked, masked.sum(dim=1)


def rand_where_nonzero(i: Any) -> tuple[Tensor, ...]:
    """With the positions of the masked tokens, as mask_tokens returns them: waits for the device."""
    xt, masked, counts = rand_where(i)
    return xt, masked, counts, masked.flatten().nonzero().squeeze(1)


def rand_tril(i: Any) -> Tensor:
    """A dense boolean mask: 8 times the bytes of the words."""
    drawn = torch.rand(i.length, i.length, device=i.ratio.device) < i.ratio
    return drawn | torch.ones(i.length, i.length, dtype=torch.bool, device=i.ratio.device).tril()


# --- sampling: (token, probability under the model) ------------------------------------------------------------------


def softmax_max(i: Any) -> tuple[Tensor, Tensor]:
    probability, token = torch.softmax(i.logits.float(), dim=-1).max(dim=-1)
    return token, probability


def gumbel_max(i: Any) -> tuple[Tensor, Tensor]:
    """The draw is of the tempered logits, the probability of the plain ones."""
    logits = i.logits.float()
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 2**-24)))
    token = (logits / i.temperature + noise).argmax(dim=-1)
    picked = logits.gather(-1, token[:, None]).squeeze(-1)
    return token, torch.exp(picked - torch.logsumexp(logits, dim=-1))


def float64_gumbel(i: Any) -> tuple[Tensor, Tensor]:
    """Exponentials and noise in float64, as the released LLaDA code has them."""
    exponential = torch.rand(i.logits.shape, dtype=torch.float64, device=i.logits.device).clamp_min(1e-300).log().neg()
    token = ((i.logits.double() / i.temperature).exp() / exponential).argmax(dim=-1)
    return token, torch.softmax(i.logits.float(), dim=-1).gather(-1, token[:, None]).squeeze(-1)


def sorted_top_p(i: Any) -> tuple[Tensor, Tensor]:
    """A sort of the vocabulary, then Categorical of what is left: what the released DiffuLLaMA code does."""
    tempered = i.logits / i.temperature
    ranked, order = torch.sort(tempered, dim=-1, descending=True)
    p = torch.softmax(ranked, dim=-1)
    removed = torch.zeros_like(tempered, dtype=torch.bool).scatter(-1, order, p.cumsum(dim=-1) - p >= i.top_p)
    kept = tempered.masked_fill(removed, torch.finfo(tempered.dtype).min)
    token = torch.distributions.Categorical(logits=kept, validate_args=False).sample()
    return token, torch.softmax(i.logits, dim=-1).gather(-1, token[:, None]).squeeze(-1)


def topk_scatter(i: Any, quota: int) -> tuple[Tensor, ...]:
    """One quota for all, known to the host."""
    order = i.confidence.masked_fill(~i.masked, -torch.inf).topk(quota, dim=1).indices
    committed = torch.zeros_like(i.masked).scatter_(1, order, True) & i.masked
    return torch.where(committed, i.token, i.xt), committed, (i.masked & ~committed).sum(dim=1)


# --- linear cross-entropy, forward and backward ----------------------------------------------------------------------


def _rows(i: Any) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], targets [N] (-100 where nothing is scored), weights [N]; N = B (L - 1)."""
    target = torch.where(i.masked, i.x0, -100)[:, 1:].flatten()
    weight = (i.loss_weight[:, None] * i.masked)[:, 1:].flatten()
    return i.hidden[:, :-1].flatten(0, 1), target, weight


def _weighted_mean(nll: Tensor, weight: Tensor) -> Tensor:
    return (nll * weight).sum() / weight.numel()


def _full_loss(rows: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return _weighted_mean(F.cross_entropy(F.linear(rows, head), target, reduction="none"), weight)


_compiled_full_loss = compiled(_full_loss)


def all_rows(i: Any) -> tuple[Tensor, ...]:
    rows, target, weight = _rows(i)
    return gradients(_full_loss(rows, i.weight, target, weight), i.hidden, i.weight)


def all_rows_compiled(i: Any) -> tuple[Tensor, ...]:
    rows, target, weight = _rows(i)
    return gradients(_compiled_full_loss(rows, i.weight, target, weight), i.hidden, i.weight)


def masked_rows(i: Any) -> tuple[Tensor, ...]:
    """Only the rows that predict a masked token, the loss in float32: what a careful engineer writes."""
    rows, target, weight = _rows(i)
    kept = (target >= 0).nonzero().squeeze(1)
    nll = F.cross_entropy(F.linear(rows[kept], i.weight).float(), target[kept], reduction="none")
    return gradients((nll * weight[kept]).sum() / weight.numel(), i.hidden, i.weight)


def torch_native(i: Any) -> tuple[Tensor, ...]:
    """torch.nn.functional.linear_cross_entropy; its chunked path takes no weight a token, so all weights are one."""
    rows, target, _ = _rows(i)
    options = torch.nn.LinearCrossEntropyOptions()
    return gradients(F.linear_cross_entropy(rows, i.weight, target, options=options), i.hidden, i.weight)


def liger(i: Any) -> tuple[Tensor, ...]:
    """It takes no weight a token either."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    rows, target, _ = _rows(i)
    out = LigerFusedLinearCrossEntropyFunction.apply(rows, i.weight, target)
    return gradients(out[0] if isinstance(out, tuple) else out, i.hidden, i.weight)


def cut_cross_entropy(i: Any) -> tuple[Tensor, ...]:
    from cut_cross_entropy import linear_cross_entropy

    rows, target, weight = _rows(i)
    nll = linear_cross_entropy(rows, i.weight, target, reduction="none")
    return gradients(_weighted_mean(nll, weight), i.hidden, i.weight)


# --- the table -------------------------------------------------------------------------------------------------------


def peers_of(op: str, shape: Mapping[str, Any]) -> dict[str, Peer]:
    """Name -> peer. Packages that are not installed are left out."""
    if op == "mask_tokens":
        return {"eager": rand_where, "eager, with positions": rand_where_nonzero, "compiled": compiled(rand_where)}
    if op == "annealed_mask":
        return {"eager, dense": rand_tril, "compiled, dense": compiled(rand_tril)}
    if op == "unmask":
        quota_rule = partial(topk_scatter, quota=int(shape["amount"]))
        return {"eager": quota_rule, "compiled": compiled(quota_rule)}
    if op == "token_stats":
        return _samplers(shape)
    if op.startswith("attention"):
        return attention_peers(op == "attention_backward", shape["mask"] == "none")
    peers: dict[str, Peer] = {"eager": all_rows, "eager, masked rows": masked_rows, "compiled": all_rows_compiled}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers["torch native, unweighted"] = torch_native
    if find_spec("liger_kernel"):
        peers["Liger, unweighted"] = liger
    if find_spec("cut_cross_entropy"):
        peers["CCE"] = cut_cross_entropy
    return peers


def _samplers(shape: Mapping[str, Any]) -> dict[str, Peer]:
    if shape["top_p"] < 1:
        return {"eager, sort": sorted_top_p}
    if shape["temperature"] == 0:
        return {"eager": softmax_max, "compiled": compiled(softmax_max)}
    return {"eager": gumbel_max, "compiled": compiled(gumbel_max), "float64 Gumbel": float64_gumbel}
