# SPDX-License-Identifier: Apache-2.0
"""Distillation from a teacher's top k against the dense formula, and what it refuses."""

import copy

import pytest
import torch
from objective_cases import BATCH, CALL, LENGTH, SEED, adapted, assert_same_gradients, gradients, objective, tokens
from objective_oracle import views
from tiny_models import MASK_ID, VOCAB
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig, distillation
from diffullama_ext.objective.distillation import TeacherTopK, teacher_top_k, top_k_divergence


def teacher(family: str = "gpt2") -> PreTrainedModel:
    """Another family with the same vocabulary."""
    return adapted(family)


def dense_kl(student: Tensor, teacher: Tensor, top_k: int, temperature: float) -> Tensor:
    """[..., V] logits -> [...]: sum over the teacher's top k of q (log q - log p)."""
    best, ids = teacher.index_fill(-1, torch.tensor([MASK_ID]), -torch.inf).topk(top_k, dim=-1)
    q = torch.softmax(best / temperature, dim=-1)
    logp = torch.log_softmax(student / temperature, dim=-1).gather(-1, ids)
    return (q * (q.log() - logp)).sum(dim=-1)


@pytest.mark.parametrize("normalizer", ["tokens", "masked", "sequence", "batch"])
@pytest.mark.parametrize(("top_k", "temperature", "weight"), [(16, 1.0, 0.5), (1, 2.0, 3.0), (VOCAB - 1, 0.7, 1.0)])
@pytest.mark.parametrize(("shift", "teacher_shift"), [(True, None), (True, False), (False, None)])
def test_the_loss_is_the_formula(
    normalizer: str, top_k: int, temperature: float, weight: float, shift: bool, teacher_shift: bool | None
) -> None:
    model, taught_by, x0 = adapted(), teacher(), tokens()
    config = {"normalizer": normalizer, "shift": shift, "distill_weight": weight, "distill_top_k": top_k}
    config |= {"distill_temperature": temperature, "teacher_shift": teacher_shift}
    goal = DiffusionObjective(ObjectiveConfig(MASK_ID, **config), taught_by)
    out = goal(model, x0, seed=SEED)
    out.loss.backward()
    got = gradients(model)
    model.zero_grad()

    plain = objective(normalizer=normalizer, shift=shift)(model, x0, seed=SEED)
    (view,) = views(goal.config, x0, torch.ones_like(x0, dtype=torch.bool), list(range(BATCH)), SEED)

    def predicting(who: PreTrainedModel, shifted: bool) -> Tensor:  # [B, L, V], row j predicts token j
        logits = who(view.xt).logits
        return logits.roll(1, dims=1) if shifted else logits

    with torch.no_grad():
        target = predicting(taught_by, shift if teacher_shift is None else teacher_shift)
    kl = dense_kl(predicting(model, shift), target, top_k, temperature) * plain.masked
    n_rows = torch.full((BATCH,), float(LENGTH - shift))
    shares = {"tokens": n_rows.sum(), "masked": plain.masked.sum(), "sequence": BATCH * n_rows, "batch": BATCH}
    expected = plain.loss + weight * (kl.sum(dim=1) / shares[normalizer]).sum()
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(got, gradients(model))
    assert torch.equal(out.stats.nll_sum, plain.stats.nll_sum)
    assert all(p.grad is None for p in taught_by.parameters())


def test_a_teacher_of_smaller_blocks_reads_its_own_streams() -> None:
    """BARD: both see one corruption, the teacher in blocks of its own length."""
    model, taught_by, x0 = adapted(), teacher("llama"), tokens()
    config = ObjectiveConfig(MASK_ID, shift=False, block_length=6, teacher_block_length=2, distill_weight=0.5)
    out = DiffusionObjective(config, taught_by)(model, x0, seed=SEED)
    plain = objective(shift=False, block_length=6)(model, x0, seed=SEED)
    (view,) = views(config, x0, torch.ones_like(x0, dtype=torch.bool), list(range(BATCH)), SEED)

    def in_blocks(who: PreTrainedModel, width: int) -> Tensor:
        logits = []
        for start in range(0, LENGTH, width):
            ids = torch.cat([x0[:, :start], view.xt[:, start : start + width]], dim=1)
            block = torch.arange(ids.shape[1]) // width
            mask = torch.where(block[None] <= block[:, None], True, False)
            logits.append(who(ids, diffusion_mask=dense_mask(mask)).logits[:, start:])
        return torch.cat(logits, dim=1)

    kl = dense_kl(in_blocks(model, 6), in_blocks(taught_by, 2), 16, 1.0)[plain.masked].sum()
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * kl / (BATCH * LENGTH), rtol=1e-5, atol=1e-6)


def dense_mask(allowed: Tensor):
    from diffullama_ext import AttentionMask

    return AttentionMask.from_dense(allowed)


def test_a_teacher_that_is_the_student_adds_nothing_to_learn() -> None:
    model, x0 = adapted(), tokens()
    with torch.no_grad():  # the mask is no token of the teacher: make it none of the student's either
        model.lm_head.weight[MASK_ID] = 0
        model.model.norm.weight.fill_(1.0)
    config = ObjectiveConfig(MASK_ID, distill_weight=1.0, distill_top_k=VOCAB - 1)
    divergence = DiffusionObjective(config, copy.deepcopy(model))(model, x0, seed=SEED).stats.weighted_sum
    divergence = divergence - objective()(model, x0, seed=SEED).stats.weighted_sum
    xt_logits = model(views(config, x0, torch.ones_like(x0, dtype=torch.bool), list(range(BATCH)), SEED)[0].xt).logits
    p_mask_id = torch.softmax(xt_logits, dim=-1)[..., MASK_ID].roll(1, dims=1)
    masked = objective()(model, x0, seed=SEED).masked
    torch.testing.assert_close(divergence, -torch.log1p(-p_mask_id[masked]).sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("alive", [1, 3 * 23, 1 << 24])
def test_chunks_and_gradients_in_double(
    softcap: float | None, with_bias: bool, alive: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "LOGITS_ALIVE", alive)
    n, vocab, width, k = 7, 23, 5, 4
    rows, weight = torch.randn(n, width).double().requires_grad_(), torch.randn(vocab, width).double().requires_grad_()
    bias = torch.randn(vocab).double().requires_grad_() if with_bias else None
    ids, probs = teacher_top_k(torch.randn(n, 9), torch.randn(vocab, 9), None, None, top_k=k, temperature=0.8, forbid=3)
    assert not (ids == 3).any()
    taught = TeacherTopK(ids, probs.double(), vocab)
    row_weight = torch.rand(n)

    def loss(*leaves: Tensor) -> Tensor:
        head = leaves[2] if with_bias else None
        return top_k_divergence(leaves[0], leaves[1], head, softcap, taught, row_weight, temperature=0.8)

    leaves = (rows, weight, bias) if with_bias else (rows, weight)
    logits = nn.functional.linear(rows, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logp = torch.log_softmax(logits / 0.8, dim=1).gather(1, taught.ids)
    expected = (row_weight * (taught.probs * (taught.probs.log() - logp)).sum(dim=1)).sum()
    torch.testing.assert_close(loss(*leaves), expected)
    assert torch.autograd.gradcheck(loss, leaves)


def test_only_what_needs_a_gradient_gets_one_and_autocast_is_followed() -> None:
    rows, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    taught = TeacherTopK(torch.randint(11, (6, 3)), torch.full((6, 3), 1 / 3), 11)
    exact = top_k_divergence(rows, weight, None, None, taught, torch.ones(6), temperature=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = top_k_divergence(rows, weight, None, None, taught, torch.ones(6), temperature=1.0)
    low.backward()
    assert rows.grad is not None
    assert low.dtype == torch.float32
    assert low != exact
    torch.testing.assert_close(low, exact, rtol=3e-2, atol=0.0)


def test_a_batch_with_nothing_scored() -> None:
    model, x0 = adapted(), tokens()
    goal = DiffusionObjective(ObjectiveConfig(MASK_ID, distill_weight=0.5), teacher())
    with pytest.warns(UserWarning, match="no token that may be masked and scored"):
        out = goal(model, x0, maskable=torch.zeros_like(x0, dtype=torch.bool), **CALL)
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_missing_unused_or_unfit_teacher() -> None:
    with pytest.raises(ValueError, match=r"teacher must be given with distill_weight=0\.5, got None"):
        objective(distill_weight=0.5)
    with pytest.raises(ValueError, match="distill_weight must be above 0 with a teacher, got 0"):
        DiffusionObjective(ObjectiveConfig(MASK_ID), teacher())
    config = ObjectiveConfig(MASK_ID, distill_weight=0.5, distill_top_k=VOCAB)
    with pytest.raises(ValueError, match=r"teacher must be in evaluation mode; call teacher\.eval\(\)"):
        DiffusionObjective(config, teacher().train())
    with pytest.raises(ValueError, match="distill_top_k must be at most the teacher's 60 tokens, got 61"):
        DiffusionObjective(config, teacher())(adapted(), tokens(), seed=SEED)
    config = ObjectiveConfig(MASK_ID, distill_weight=0.5)
    with pytest.raises(ValueError, match="the teacher's vocabulary has 65 ids, the student's 61: they must be one"):
        DiffusionObjective(config, adapted("gpt2", vocab_size=65))(adapted(), tokens(), seed=SEED)
