# SPDX-License-Identifier: Apache-2.0
"""LoRA with a trainable mask token, weights of GGUF files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import MASK_ID, VOCAB, causal_lm, word_tokenizer

from diffullama_ext.integrations import adapt, add_lora
from diffullama_ext.integrations.loading import _load_model
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig

x0 = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    return DiffusionObjective(ObjectiveConfig(MASK_ID))(model, x0, seed=1).loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize("family", ["gpt2", "llama"], ids=["tied head", "head of its own"])
def test_lora_trains_the_mask_tokens_row_and_no_other(family: str) -> None:
    base = adapt(causal_lm(family), mask_token=MASK_ID)
    before, untouched = base.get_input_embeddings().weight.detach().clone(), loss_of(base).item()
    model = add_lora(base, rank=2).train()
    assert loss_of(model).item() == pytest.approx(untouched, rel=1e-5)  # adapters begin as nothing
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    trained = loss_of(model.eval()).item()
    assert trained < untouched - 0.05
    merged = model.merge_and_unload()
    changed = (merged.get_input_embeddings().weight != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [MASK_ID]
    assert loss_of(merged).item() == pytest.approx(trained, rel=1e-4)


def test_gguf_weights_come_through_transformers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = causal_lm("llama", num_key_value_heads=4)
    config = model.config
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    inner |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    inner |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"model.layers.{i}.{a}": f"blk.{i}.{b}" for i in range(2) for a, b in inner.items()}
    for name, p in model.named_parameters():
        array = p.detach().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves of each head
            array = array.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    word_tokenizer().save_pretrained(tmp_path)
    loaded = _load_model(str(tmp_path), {"gguf_file": "m.gguf", "dtype": torch.float32}).eval()
    torch.testing.assert_close(loaded(x0).logits, model(x0).logits, rtol=1e-4, atol=1e-4)
