# SPDX-License-Identifier: Apache-2.0
"""Adapted models against plain transformers with the same weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, MASK_ID, VOCAB, causal_lm, checkpoint_activations
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from diffullama_ext import AttentionMask
from diffullama_ext.integrations import adapt, register_attention
from diffullama_ext.integrations.transformers import attention_forward

LENGTH = 13


def ids(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --- the three attention patterns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mask", "is_causal"])
def test_ratio_0_gives_the_causal_models_logits(family: str, how: str) -> None:
    x = ids()
    expected = causal_lm(family)(x).logits
    model = adapt(causal_lm(family), mask_token=MASK_ID)
    given = {"diffusion_mask": AttentionMask.annealed(LENGTH, 0.0, seed=0)} if how == "mask" else {"is_causal": True}
    close(model(x, **given).logits, expected)
    assert (model(x).logits - expected).abs().max() > 0.1, "the pattern must matter for this test to mean something"


def test_the_models_own_scale_is_used() -> None:
    x, unusual = ids(), {"scale_attn_by_inverse_layer_idx": True}
    model = adapt(causal_lm("gpt2", **unusual), mask_token=MASK_ID)
    close(model(x, is_causal=True).logits, causal_lm("gpt2", **unusual)(x).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ratio_1_gives_the_logits_of_plain_transformers_on_the_saved_model(
    family: str, attention: str, tmp_path: Path
) -> None:
    model = adapt(causal_lm(family), mask_token=MASK_ID)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert plain.config._attn_implementation == attention
    assert plain.config.is_causal is False
    x = ids()
    close(model(x).logits, plain(x).logits)
    close(model(x, diffusion_mask=AttentionMask.annealed(LENGTH, 1.0, seed=0)).logits, plain(x).logits)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_every_layer_attends_under_the_given_mask(family: str, tie: bool) -> None:
    mask = AttentionMask.annealed(LENGTH, 0.4, seed=3, step=5)
    additive = torch.where(mask.to_dense(), 0.0, torch.finfo(torch.float32).min)[:, None]  # [1, 1, L, L]
    x = ids()
    plain = causal_lm(family, tie_word_embeddings=tie, attn_implementation="eager")
    expected = plain(x, attention_mask=additive.expand(len(x), -1, -1, -1)).logits
    model = adapt(causal_lm(family, tie_word_embeddings=tie), mask_token=MASK_ID)
    close(model(x, diffusion_mask=mask).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_padding_changes_nothing_at_real_positions(family: str, side: str, ratio: float) -> None:
    model = adapt(causal_lm(family), mask_token=MASK_ID)
    x, n_pad = ids(), 4
    junk = ids(length=n_pad)
    allowed = AttentionMask.annealed(LENGTH, ratio, seed=1).to_dense()[0]
    wide = torch.ones(LENGTH + n_pad, LENGTH + n_pad, dtype=torch.bool)
    real = slice(n_pad, None) if side == "left" else slice(LENGTH)
    wide[real, real] = allowed
    padded = torch.cat([junk, x] if side == "left" else [x, junk], dim=1)
    attention_mask = torch.zeros_like(padded)
    attention_mask[:, real] = 1
    got = model(
        padded,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        diffusion_mask=AttentionMask.from_dense(wide),
    ).logits
    close(got[:, real], model(x, diffusion_mask=AttentionMask.from_dense(allowed)).logits)


def test_documents_do_not_see_each_other(family: str) -> None:
    model = adapt(causal_lm(family), mask_token=MASK_ID)
    x, other = ids(), ids()
    document = torch.tensor([0] * 5 + [1] * (LENGTH - 5))
    changed = torch.where(document == 0, x, other)
    mask = AttentionMask.documents(document)
    first = document == 0
    close(model(x, diffusion_mask=mask).logits[:, first], model(changed, diffusion_mask=mask).logits[:, first])


def test_a_model_that_is_not_adapted_stays_causal(family: str) -> None:
    register_attention()
    x = ids()
    model = causal_lm(family)
    expected = model(x).logits
    model.set_attn_implementation("diffullama")
    close(model(x).logits, expected)


def test_a_model_that_is_not_adapted_still_generates_with_its_cache() -> None:
    register_attention()
    x = ids(batch=1)
    model = causal_lm("llama")
    expected = model.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=1)
    model.set_attn_implementation("diffullama")
    assert torch.equal(model.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=1), expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    x = ids()

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = adapt(causal_lm(family), mask_token=MASK_ID).train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        mask = AttentionMask.annealed(LENGTH, 0.5, seed=2)
        model(x, diffusion_mask=mask).logits.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


# --- registration ---------------------------------------------------------------------------------------------------


def test_importing_registers_nothing() -> None:
    code = """
import sys, diffullama_ext
assert "transformers" not in sys.modules
from diffullama_ext.integrations import register_attention
from transformers import AttentionInterface, AttentionMaskInterface
interfaces = AttentionInterface(), AttentionMaskInterface()
assert not any("diffullama" in i for i in interfaces)
register_attention(); register_attention()
assert all("diffullama" in i for i in interfaces)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_sliding_window_is_never_dropped_silently() -> None:
    register_attention()
    model = causal_lm("mistral", sliding_window=4)
    model.set_attn_implementation("diffullama")
    assert model(ids(length=4)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"has no window, got one of 4 for 5 keys"):
        model(ids(length=5))


def test_a_4d_mask_is_refused() -> None:
    model = adapt(causal_lm("llama"), mask_token=MASK_ID)
    with pytest.raises(ValueError, match=r"attention_mask must be padding \[B, L\], got \[3, 1, 13, 13\]"):
        model(ids(), attention_mask=torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool))


def test_a_mask_for_another_length_is_refused() -> None:
    model = adapt(causal_lm("llama"), mask_token=MASK_ID)
    with pytest.raises(ValueError, match=r"mask must be for \(13, 13\), got AttentionMask\(causal, \[1, 5, 5\]"):
        model(ids(), diffusion_mask=AttentionMask.causal(5))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_the_attention_lacks_is_refused(name: str) -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"attention has no {name}; Linear needs it"):
        attention_forward(nn.Linear(1, 1), q, q, q, None, is_causal=False, **{name: torch.ones(2)})


def test_a_model_that_drops_forward_arguments_is_refused() -> None:
    config = StableLmConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = adapt(StableLmForCausalLM(config), mask_token=MASK_ID)
    with pytest.raises(ValueError, match="StableLmAttention gets no keyword arguments of the model's forward"):
        model(ids(), diffusion_mask=AttentionMask.causal(LENGTH))
