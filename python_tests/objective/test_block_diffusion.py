# SPDX-License-Identifier: Apache-2.0
"""Two streams and documents: who attends to whom, and that a packed sequence is its parts."""

import warnings
from typing import Any

import pytest
import torch
from objective_cases import BATCH, LENGTH, SEED, adapted, objective, tokens
from objective_oracle import VARIANTS
from oracles import annealed_allowed
from tiny_models import MASK_ID
from torch import Tensor, nn

from diffullama_ext import AttentionMask
from diffullama_ext.objective.streams import Attending, two_streams

ids_of_blocks = pytest.mark.parametrize(
    "ids", [[0, 0, 0, 1, 1, 1, 2], [0], [0] * 40, list(range(37)), [3, 3, 5, 5, 9]], ids=lambda ids: f"{len(ids)} ids"
)


def allowed_in_two_streams(ids: list[int]) -> list[list[bool]]:
    """BD3-LM's M_BD, M_OBC and M_BC, entry by entry."""
    n = len(ids)
    dense = [[False] * (2 * n) for _ in range(2 * n)]
    for q in range(n):
        for k in range(n):
            dense[q][k] = ids[q] == ids[k]
            dense[q][n + k] = ids[k] < ids[q]
            dense[n + q][n + k] = ids[k] <= ids[q]
    return dense


@ids_of_blocks
def test_the_two_stream_mask(ids: list[int], device: str) -> None:
    mask = AttentionMask.two_streams(torch.tensor(ids, device=device))
    assert mask.to_dense()[0].tolist() == allowed_in_two_streams(ids)
    rows = AttentionMask.two_streams(torch.tensor([ids, ids[::-1]], device=device))
    assert rows.to_dense()[1].tolist() == allowed_in_two_streams(ids[::-1])


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_annealing_opens_what_looks_ahead(ratio: float) -> None:
    x0 = tokens(2, 11)
    streams = two_streams(x0, x0, Attending(None, None, ratio, SEED, 5), 4, False)
    ids = [j // 4 for j in range(11)]
    drawn = annealed_allowed(22, ratio, SEED, 5)
    expected = [
        [allowed and (k % 11 <= q % 11 or bool(drawn[q, k] and (k > q or ratio == 1))) for k, allowed in enumerate(row)]
        for q, row in enumerate(allowed_in_two_streams(ids))
    ]
    assert streams.inputs["diffusion_mask"].to_dense()[0].tolist() == expected


def test_the_block_length_grows_with_the_step() -> None:
    model, x0 = adapted(), tokens()
    growing = objective(block_length=8, block_length_start=2, block_length_steps=4)
    for step, length in [(0, 2), (1, 2), (2, 4), (4, 8), (9, 8)]:
        got = growing(model, x0, seed=SEED, step=step)
        expected = objective(block_length=length)(model, x0, seed=SEED, step=step)
        assert torch.equal(got.loss, expected.loss)
    masked = objective(block_length=8, block_length_start=2, block_length_steps=4, normalizer="masked")
    for step in (0, 9):
        assert masked.denominator(x0, seed=SEED, step=step) == masked(model, x0, seed=SEED, step=step).stats.n_scored
    with pytest.raises(TypeError, match="step must be an int while the block length grows"):
        growing(model, x0, seed=SEED, step=torch.tensor([3]))
    fixed = objective(block_length=8)
    assert torch.equal(
        fixed(model, x0, seed=SEED, step=torch.tensor([3])).loss, fixed(model, x0, seed=SEED, step=3).loss
    )


# --- documents --------------------------------------------------------------------------------------------------------

PARTS = [[5, 1, 6], [4, 8], [12], [3, 3, 3, 3]]


def packed_ids() -> Tensor:
    rows = [[number for number, n in enumerate(parts) for _ in range(n)] for parts in PARTS]
    return torch.tensor(rows)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])
@pytest.mark.parametrize("block_length", [None, 3])
def test_isolated_documents_are_the_documents_alone(family: str, shift: bool, block_length: int | None) -> None:
    """At t = 1, where no draw matters. With blocks only documents that begin with one are as if alone."""
    model, x0 = adapted(family), tokens()
    rows = [0, 3] if block_length is None else [3]
    goal = objective(shift=shift, block_length=block_length, normalizer="batch")

    def levels(n: int, length: int) -> Tensor:
        return torch.ones(n) if block_length is None else torch.ones(n, -(-length // block_length))

    for row in rows:
        one, maskable = x0[row : row + 1], torch.arange(LENGTH)[None] % 3 != 1  # some stay to be seen
        call = {"maskable": maskable, "seed": SEED, "t": levels(1, LENGTH)}
        whole = goal(model, one, document_ids=packed_ids()[row : row + 1], **call)
        parts = zip(one.split(PARTS[row], dim=1), maskable.split(PARTS[row], dim=1), strict=True)
        alone = [
            goal(model, part, maskable=able, seed=SEED, t=levels(1, part.shape[1]))
            for part, able in parts
            if part.shape[1] > 1 or not shift
        ]
        torch.testing.assert_close(whole.loss, sum(out.loss for out in alone), rtol=1e-5, atol=1e-5)
        assert whole.stats.n_scored == sum(out.stats.n_scored for out in alone)
        together = goal(model, one, **call)
        assert together.loss != whole.loss


def test_documents_with_annealing_and_padding() -> None:
    """The bits of the annealing inside each document, and padding as a document of its own."""
    model, x0, ids = adapted(), tokens(), packed_ids()
    goal = objective(normalizer="batch")
    call = {"seed": SEED, "step": 3, "attn_mask_ratio": 0.5, "t": torch.ones(BATCH)}
    out = goal(model, x0, document_ids=ids, **call)
    dense = AttentionMask.annealed(LENGTH, 0.5, seed=SEED, step=3).to_dense() & (ids[:, :, None] == ids[:, None, :])
    position = torch.tensor([[place for n in parts for place in range(n)] for parts in PARTS])
    xt = torch.full_like(x0, MASK_ID)
    logits = model(xt, diffusion_mask=AttentionMask.from_dense(dense), position_ids=position).logits
    nll = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), x0[:, 1:], reduction="none")
    same = ids[:, 1:] == ids[:, :-1]
    torch.testing.assert_close(out.loss, (nll * same).sum() / BATCH)

    pad = nn.functional.pad
    padded = goal(
        model,
        pad(x0, (0, 4), value=9),
        document_ids=pad(ids, (0, 4), value=-1),
        attention_mask=pad(torch.ones_like(x0), (0, 4)),
        **call | {"attn_mask_ratio": 1.0},
    )
    bare = goal(model, x0, document_ids=ids, **call | {"attn_mask_ratio": 1.0})
    torch.testing.assert_close(padded.loss, bare.loss)
    assert padded.stats.n_scored == bare.stats.n_scored


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.get("loss_weight") != "cart"], ids=str)
def test_documents_and_padding_of_a_batch_are_each_sequences_own(variant: dict[str, Any]) -> None:
    """Two views and two streams included: a batch is the sum of its sequences."""
    model, x0, ids = adapted(), tokens(), packed_ids()
    attention_mask = torch.arange(LENGTH) < torch.tensor([[12], [7], [9], [1]])
    goal, call = objective(**variant), {"seed": SEED, "step": 2, "attn_mask_ratio": 0.3, "normalizer": 1.0}
    whole = goal(model, x0, document_ids=ids, attention_mask=attention_mask, **call)
    loss = 0.0
    for b in range(BATCH):
        one = slice(b, b + 1)
        given = {"document_ids": ids[one], "attention_mask": attention_mask[one], "sample_index": torch.tensor([b])}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a batch has no token that may be masked")  # one token, and the shift
            loss += goal(model, x0[one], **given, **call).loss.item()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert loss > 0


def test_bad_documents() -> None:
    model, x0 = adapted(), tokens()
    with pytest.raises(ValueError, match=r"document_ids must be int64\[4, 12\], got int64\[4, 11\]"):
        objective()(model, x0, document_ids=packed_ids()[:, 1:], seed=SEED)
    with pytest.raises(ValueError, match="document_ids must be None with loss_weight='cart'"):
        objective(loss_weight="cart")(model, x0, document_ids=packed_ids(), seed=SEED)
