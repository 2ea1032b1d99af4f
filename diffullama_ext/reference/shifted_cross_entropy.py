# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of masked tokens when logits row i scores token i+1 (shift) or token i (no shift).

Everything is per token, [B, L]: entry (b, j) belongs to the target x0[b, j] and is 0 where nothing is scored.
"""

import torch
from torch import Tensor


def scored_tokens(masked: Tensor, shift: bool) -> Tensor:
    """Masked tokens that some logits row predicts: with the shift nothing predicts position 0."""
    if not shift:
        return masked
    scored = masked.clone()
    scored[:, :1] = False
    return scored


def _only_scoring_rows(x: Tensor, scored: Tensor, shift: bool) -> Tensor:
    """x [B, L, ...] with 0 in every row that scores nothing: a NaN there must not reach a gradient through 0 * NaN."""
    return torch.where((scored.roll(-1, dims=1) if shift else scored)[..., None], x, 0.0)


def _target_ids(x0: Tensor, scored: Tensor, vocab: int) -> Tensor:
    """x0 with unscored entries set to 0; an id outside the vocabulary at a scored one is an IndexError on the CPU."""
    ids = x0.masked_fill(~scored, 0)
    if ids.device.type == "cpu":
        bad = (ids < 0) | (ids >= vocab)
        if bad.any():
            raise IndexError(
                f"x0 has the id {int(ids[bad][0])} at a masked position, outside the vocabulary [0, {vocab})"
            )
    return ids


def shifted_cross_entropy(
    logits: Tensor, x0: Tensor, masked: Tensor, shift: bool, label_smoothing: float = 0.0, softcap: float = 0.0
) -> Tensor:
    """Per-token negative log-likelihood [B, L] of x0 under logits [B, L, V], in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scored = scored_tokens(masked, shift)
    logits = _only_scoring_rows(logits, scored, shift)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ids = _target_ids(x0, scored, logits.shape[-1])
    logp = torch.log_softmax(logits, dim=-1)  # [B, L, V]
    if shift:  # row i scores token i+1; row L-1 scores nothing
        logp = torch.cat([logp[:, :1], logp[:, :-1]], dim=1)
    nll = -logp.gather(-1, ids[..., None]).squeeze(-1)
    if label_smoothing:
        nll = (1.0 - label_smoothing) * nll - label_smoothing * logp.mean(dim=-1)
    return torch.where(scored, nll, 0.0)


def linear_shifted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    masked: Tensor,
    shift: bool,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """The same for logits = hidden @ weight.T + bias; hidden [B, L, H], weight [V, H], bias [V]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = _only_scoring_rows(hidden.to(dtype), scored_tokens(masked, shift), shift)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtype is chosen already
        logits = torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    return shifted_cross_entropy(logits, x0, masked, shift, label_smoothing, softcap)
