# SPDX-License-Identifier: Apache-2.0
"""The objective under wrappers, adapters and architectures; which of them it refuses."""

from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
from objective_cases import (
    BATCH,
    CALL,
    LENGTH,
    SEED,
    adapted,
    assert_same_gradients,
    full_logits,
    gradients,
    objective,
    tokens,
)
from peft import LoraConfig, get_peft_model
from tiny_models import MASK_ID, VOCAB, checkpoint_activations
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, OPTConfig, PreTrainedModel

from diffullama_ext import mask_tokens
from diffullama_ext.integrations import adapt
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig

PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # of transformers, by peft


# --- models and wrappers ----------------------------------------------------------------------------------------------


def test_the_full_logits_are_never_made() -> None:
    model, rows = adapted(), []
    model.lm_head.register_forward_hook(lambda _module, _args, logits: rows.append(logits.shape[1]))
    objective()(model, tokens(), **CALL).loss.backward()
    assert max(rows) == 1


def test_the_model_is_left_as_it_was() -> None:
    model, x0 = adapted(), tokens()
    before = model(x0).logits
    objective()(model, x0, **CALL)
    with pytest.raises(ValueError, match="attn_mask_ratio"):
        objective()(model, x0, seed=1, attn_mask_ratio=1.5)
    with pytest.raises(RuntimeError, match="inside"):
        objective()(Failing(model), x0, **CALL)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(x0).logits, before)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


class Failing(Wrapper):
    def forward(self, **inputs: Any) -> Any:
        raise RuntimeError("inside")


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: PreTrainedModel) -> nn.Module:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=True)


def compiled(model: PreTrainedModel) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`", "ignore:The .grad attribute of")
@pytest.mark.parametrize(
    ("wrap", "tie"),
    [
        (Wrapper, True),
        (ddp, True),
        (ddp, False),
        (fsdp2, True),
        (fsdp2, False),
        (checkpoint_activations, True),
        (compiled, False),
    ],
    ids=lambda value: value.__name__ if callable(value) else "tied" if value else "untied",
)
def test_a_wrapper_changes_neither_loss_nor_gradients(wrap: Callable, tie: bool) -> None:
    x0, model = tokens(), adapted(tie_word_embeddings=tie)
    wrapped_inner = adapted(tie_word_embeddings=tie)
    wrapped = wrap(wrapped_inner)
    for step in range(2):
        call = CALL | {"step": step, "attn_mask_ratio": 0.2 + 0.5 * step}
        expected = objective()(model, x0, **call)
        expected.loss.backward()
        got = objective()(wrapped, x0, **call)
        got.loss.backward()
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert got.stats.n_scored == expected.stats.n_scored
    local = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in wrapped_inner.parameters()]
    assert_same_gradients(local, gradients(model))


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_lora_trains_its_adapters_only() -> None:
    x0 = tokens()
    model = get_peft_model(adapted(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    out = objective()(model, x0, **CALL)
    out.loss.backward()
    torch.testing.assert_close(out.loss, objective()(adapted(), x0, **CALL).loss)  # B is 0 at the start
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all("lora_B" in name for name in trained)


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_a_head_trained_whole_beside_lora_is_the_one_scored() -> None:
    model = get_peft_model(adapted(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(2.0)
    x0 = tokens()
    out = objective()(model, x0, **CALL)
    out.loss.backward()
    t = out.t
    xt, masked, _, _ = mask_tokens(x0, t, mask_id=MASK_ID, seed=SEED)
    nll = oracles.dense_nll(full_logits(model, xt), x0, masked, True)
    torch.testing.assert_close(out.loss, (nll / t[:, None]).sum() / (BATCH * (LENGTH - 1)))
    assert any("lm_head.modules_to_save" in n for n, p in model.named_parameters() if p.grad is not None)


def test_autocast_reaches_the_loss() -> None:
    model, x0 = adapted(), tokens()
    exact = objective()(model, x0, **CALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = objective()(model, x0, **CALL)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.loss != exact.loss
    torch.testing.assert_close(out.loss, exact.loss, rtol=3e-2, atol=0.0)


def test_final_logit_softcapping_is_respected() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        layer_types=["full_attention"] * 2,
        sliding_window=64,
        attn_logit_softcapping=None,
        final_logit_softcapping=1.5,
        initializer_range=0.5,
        pad_token_id=0,
    )
    model, x0 = adapt(AutoModelForCausalLM.from_config(config).eval(), mask_token=MASK_ID), tokens()
    out = objective()(model, x0, **CALL)
    xt, masked, _, _ = mask_tokens(x0, out.t, mask_id=MASK_ID, seed=SEED)
    nll = oracles.dense_nll(full_logits(model, xt), x0, masked, True)
    torch.testing.assert_close(out.loss, (nll / out.t[:, None]).sum() / (BATCH * (LENGTH - 1)))


def test_a_decoder_inside_the_base_model_is_found() -> None:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=32,
        dropout=0.0,
        init_std=0.2,
    )
    model, x0 = adapt(AutoModelForCausalLM.from_config(config).eval(), mask_token=MASK_ID), tokens()
    out = objective()(model, x0, **CALL)
    xt, masked, _, _ = mask_tokens(x0, out.t, mask_id=MASK_ID, seed=SEED)
    nll = oracles.dense_nll(full_logits(model, xt), x0, masked, True)
    torch.testing.assert_close(out.loss, (nll / out.t[:, None]).sum() / (BATCH * (LENGTH - 1)))


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_a_head_with_lora_is_refused() -> None:
    model = get_peft_model(adapted(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"the head is a Linear of an adapter.*target_modules.*modules_to_save"):
        objective()(model, tokens(), **CALL)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`", "ignore:The .grad attribute of")
@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["plain", "compiled"])
def test_logits_scaled_outside_the_head_are_refused(wrap: Callable) -> None:
    config = GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        logits_scaling=4.0,
    )
    model = wrap(adapt(AutoModelForCausalLM.from_config(config), mask_token=MASK_ID))
    with pytest.raises(ValueError, match="logits of GraniteForCausalLM are not its head's output"):
        objective()(model, tokens(), **CALL)


def test_a_forward_that_leaves_out_its_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr(model, "get_decoder", lambda: nn.Identity())
    with pytest.raises(ValueError, match="forward of LlamaForCausalLM does not call its Identity"):
        objective()(model, tokens(), **CALL)


def test_attention_that_would_ignore_the_mask_is_refused() -> None:
    model = adapted()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attention must be 'diffullama', got 'sdpa'; call .*prepare"):
        objective()(model, tokens(), **CALL)


def test_ids_without_an_embedding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask_id must be within the model's 61 embeddings, got 61; resize them"):
        DiffusionObjective(ObjectiveConfig(VOCAB))(adapted(), tokens(), **CALL)
    with pytest.raises(ValueError, match="vocab_size must be within the model's 61 embeddings, got 62"):
        objective(noise="mix", vocab_size=VOCAB + 1)(adapted(), tokens(), **CALL)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="transformers causal language model, got Linear; with another model call mask"):
        objective()(nn.Linear(2, 2), tokens(), **CALL)
    with pytest.raises(TypeError, match="transformers causal language model, got LlamaModel"):
        objective()(adapted().model, tokens(), **CALL)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`", "ignore:The .grad attribute of")
def test_a_compiled_model_still_counts_batches_with_nothing_to_score() -> None:
    x0, goal, model = tokens(), objective(), compiled(adapted())
    with pytest.warns(UserWarning, match="no token that may be masked and scored"):
        out = goal(model, x0, maskable=torch.zeros_like(x0, dtype=torch.bool), **CALL)
    assert (out.loss, goal.n_empty_batches) == (0, 1)
    assert goal(model, x0, **CALL).loss > 0
    assert goal.n_empty_batches == 1
