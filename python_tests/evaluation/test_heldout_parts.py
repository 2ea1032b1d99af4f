# SPDX-License-Identifier: Apache-2.0
"""Held-out figures of prompts, padding, documents and block diffusion against dense, token-by-token computations."""

import pytest
import torch
from tiny_models import MASK_ID, VOCAB, causal_lm
from torch import Tensor
from torch.nn import functional as F

from diffullama_ext import AttentionMask, mask_tokens
from diffullama_ext.evaluation import EvaluationConfig, autoregressive_loss, diffusion_scores
from diffullama_ext.integrations import adapt
from diffullama_ext.objective import draw_t

N, LENGTH, LEVEL = 5, 11, 0.6
CONFIG = EvaluationConfig(draws=2, times=(LEVEL,), seed=5, batch_size=2)
REAL = torch.arange(LENGTH) < torch.tensor([[11], [9], [7], [11], [4]])  # padding on the right
ABLE = torch.arange(LENGTH) >= torch.tensor([[3], [1], [0], [5], [2]])  # behind the prompt
DOCUMENTS = (torch.arange(LENGTH) >= torch.tensor([[4], [6], [11], [1], [8]])).long()


def adapted(family: str = "llama"):
    return adapt(causal_lm(family), mask_token=MASK_ID)


@pytest.fixture
def x0() -> Tensor:
    return torch.randint(8, VOCAB, (N, LENGTH))


def alone(model, ids: Tensor) -> Tensor:
    """[n, V] logits of one sequence under full attention, nothing beside it."""
    with torch.no_grad():
        return model(input_ids=ids[None], diffusion_mask=AttentionMask.full(len(ids))).logits[0].double()


def expected(x0: Tensor, logits_of, able: Tensor, scorable: Tensor, shift: bool) -> tuple[float, float]:
    """(ELBO a token, plain loss at LEVEL); logits_of(row, xt) [L, V], row j - 1 predicts j with the shift."""
    number = torch.arange(N)

    def sums(index: Tensor, t: Tensor) -> list[tuple[float, int]]:
        drawn = mask_tokens(x0, t, mask_id=MASK_ID, maskable=able, seed=CONFIG.seed, sample_index=index)
        out = []
        for b in range(N):
            places = (drawn.masked[b] & scorable[b]).nonzero()[:, 0].tolist()
            logits = logits_of(b, drawn.xt[b])
            nll = sum(float(F.cross_entropy(logits[j - int(shift)], x0[b, j])) for j in places)
            out.append((nll, len(places)))
        return out

    elbo = 0.0
    for draw in range(CONFIG.draws):
        t = draw_t(number * CONFIG.draws + draw, CONFIG.seed, t_min=CONFIG.t_min, strata=CONFIG.draws)
        nll = sums(number * CONFIG.draws + draw, t)
        elbo += sum(one / float(level) for (one, _), level in zip(nll, t, strict=True))
    at = sums(number, torch.full((N,), LEVEL))
    return elbo / (CONFIG.draws * int(scorable.sum())), sum(n for n, _ in at) / sum(c for _, c in at)


def assert_figures(scores, figures: tuple[float, float]) -> None:
    assert scores.diffusion_loss.mean == pytest.approx(figures[0], rel=1e-5)
    assert scores.masked_loss[LEVEL].mean == pytest.approx(figures[1], rel=1e-5)


@pytest.mark.parametrize("shift", [True, False])
def test_prompts_and_padding_count_for_nothing(x0, shift):
    """As if each sequence were alone and cut where its padding begins."""
    model = adapted()
    scores = diffusion_scores(model, x0, CONFIG, mask_id=MASK_ID, shift=shift, maskable=ABLE, attention_mask=REAL)
    scorable = ABLE & REAL
    if shift:
        scorable = scorable & (torch.arange(LENGTH) > 0)

    def logits_of(b: int, xt: Tensor) -> Tensor:
        return alone(model, xt[REAL[b]])

    assert_figures(scores, expected(x0, logits_of, ABLE & REAL, scorable, shift))


def test_documents_do_not_see_each_other(x0):
    model = adapted()
    scores = diffusion_scores(model, x0, CONFIG, mask_id=MASK_ID, shift=True, document_ids=DOCUMENTS)
    scorable = torch.zeros(N, LENGTH, dtype=torch.bool)
    scorable[:, 1:] = DOCUMENTS[:, 1:] == DOCUMENTS[:, :-1]

    def logits_of(b: int, xt: Tensor) -> Tensor:
        return torch.cat([alone(model, xt[DOCUMENTS[b] == d]) for d in DOCUMENTS[b].unique()])

    assert_figures(scores, expected(x0, logits_of, torch.ones_like(scorable), scorable, True))


@pytest.mark.parametrize("shift", [True, False])
def test_blocks_see_themselves_and_the_clean_ones_before(x0, shift):
    model, width = adapted(), 4
    scores = diffusion_scores(model, x0, CONFIG, mask_id=MASK_ID, shift=shift, block_length=width)
    scorable = torch.ones(N, LENGTH, dtype=torch.bool)
    scorable[:, 0] = not shift

    def logits_of(b: int, xt: Tensor) -> Tensor:
        rows = []
        for start in range(0, LENGTH, width):
            ids = torch.cat([x0[b, :start], xt[start : start + width]])
            block = torch.arange(len(ids)) // width
            mask = AttentionMask.from_dense(block[None] <= block[:, None])
            with torch.no_grad():
                logits = model(input_ids=ids[None], diffusion_mask=mask).logits[0].double()
            if shift and start > 0:  # the first token of a block is predicted by the clean row before it
                rows[-1] = logits[start - 1]
            rows += list(logits[start:])
        return torch.stack(rows)

    assert_figures(scores, expected(x0, logits_of, torch.ones_like(scorable), scorable, shift))


def test_one_block_is_no_block(x0):
    """Without the shift; with it the block's first token has the row before it, of which there is none."""
    model = adapted()
    whole = diffusion_scores(model, x0, CONFIG, mask_id=MASK_ID, shift=False)
    block = diffusion_scores(model, x0, CONFIG, mask_id=MASK_ID, shift=False, block_length=LENGTH)
    assert block.diffusion_loss.mean == pytest.approx(whole.diffusion_loss.mean, rel=1e-5)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_the_autoregressive_loss_of_responses(x0, before):
    model = causal_lm("llama")
    total, count = 0.0, 0
    for b in range(N):
        ids = x0[b][REAL[b]]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        for j in range(1, len(ids)):
            if ABLE[b, j]:
                total, count = total + float(F.cross_entropy(logits[j - 1], ids[j])), count + 1
    if not before:
        adapt(model, mask_token=MASK_ID)
    loss = autoregressive_loss(model, x0, maskable=ABLE, attention_mask=REAL, batch_size=2)
    assert loss.mean == pytest.approx(total / count, rel=1e-5)


def test_what_does_not_go_together(x0):
    with pytest.raises(ValueError, match="diffusion_mask must be None with block_length=4"):
        diffusion_scores(
            adapted(), x0, mask_id=MASK_ID, shift=True, block_length=4, diffusion_mask=AttentionMask.causal(LENGTH)
        )
    with pytest.raises(ValueError, match=r"maskable must be bool\[5, 11\], got bool\[5, 3\]"):
        diffusion_scores(adapted(), x0, mask_id=MASK_ID, shift=True, maskable=ABLE[:, :3])
    with pytest.raises(ValueError, match="document_ids must be None with a model that is not adapted"):
        autoregressive_loss(causal_lm("llama"), x0, document_ids=DOCUMENTS)
    unprepared = adapted()
    unprepared.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="the model's attention must be 'diffullama', got 'sdpa'"):
        diffusion_scores(unprepared, x0, mask_id=MASK_ID, shift=True)
    with pytest.raises(ValueError, match="the model's attention must be 'diffullama', got 'sdpa'"):
        autoregressive_loss(unprepared, x0)
