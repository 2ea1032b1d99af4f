# SPDX-License-Identifier: Apache-2.0
"""The layouts that diffusion models are published in, on small models written name by name as those are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, causal_lm, word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from diffullama_ext.integrations import CONVENTIONS, DiffusionConfig, load, load_causal_lm, save_wrapped

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

# A wrapper's names, written down by hand from the published files.
GPT2_BLOCK = ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight")
GPT2_BLOCK += ("attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias")
GPT2_BLOCK += ("mlp.c_proj.weight", "mlp.c_proj.bias")
GPT2_NAMES = {
    "embed_tokens.weight",
    "denoise_model.wpe.weight",
    "denoise_model.ln_f.weight",
    "denoise_model.ln_f.bias",
    *(f"denoise_model.h.{layer}.{name}" for layer in range(2) for name in GPT2_BLOCK),
}


def ids() -> Tensor:
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def bidirectional(model: PreTrainedModel) -> Tensor:
    """Logits as the released code computes them: the same weights under no causal mask."""
    model.config.is_causal = False
    model.set_attn_implementation("eager")
    x = ids()
    return model(x, attention_mask=torch.zeros(2, 1, x.shape[1], x.shape[1])).logits


def wrapper_tensors(model: PreTrainedModel, head: bool = False) -> dict[str, Tensor]:
    """What DiffuGPT's wrapper saves of a GPT-2."""
    tensors = {"embed_tokens.weight": model.transformer.wte.weight}
    tensors |= {f"denoise_model.{name}": p for name, p in model.transformer.named_parameters() if "wte" not in name}
    if head:
        tensors["lm_head.weight"] = model.lm_head.weight
    return {name: p.detach().clone().half() for name, p in tensors.items()}


def write(folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    values = model.config.to_dict() | {"architectures": ["DiscreteDiffusionModel"]} | config
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors", metadata={"lm_head.weight": "embed_tokens.weight"})
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _small_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published mask ids, brought into the small vocabulary."""
    for name, (mask_id, shift) in {"diffugpt-s": (7, True), "diffugpt-m": (61, True), "diffullama": (11, True)}.items():
        monkeypatch.setitem(CONVENTIONS, name, type(CONVENTIONS[name])(mask_id, shift))


def close(got: Tensor, want: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(got.float(), want.float(), **(tolerance or {"rtol": 1e-4, "atol": 1e-4}))


# --- the wrapper of DiffuGPT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True], ids=["tied head left out", "tied head stored twice"])
def test_diffugpt_s(tmp_path: Path, head: bool) -> None:
    original = causal_lm("gpt2").half().float()
    tensors = wrapper_tensors(original, head)
    assert tensors.keys() - {"lm_head.weight"} == GPT2_NAMES
    model, tokenizer = load(write(tmp_path / "diffugpt-s", original, tensors), dtype=torch.float32)
    assert DiffusionConfig.of(model) == DiffusionConfig(7, shift=True)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(tokenizer) == VOCAB
    close(model.eval()(ids()).logits, bidirectional(original))


def test_diffugpt_m_has_a_row_more_than_its_config(tmp_path: Path) -> None:
    original = causal_lm("gpt2", vocab_size=VOCAB + 1)
    folder = write(tmp_path / "diffugpt-m", original, wrapper_tensors(original), vocab_size=VOCAB)
    model, _ = load(folder, dtype=torch.float32)
    assert (model.config.vocab_size, DiffusionConfig.of(model).mask_id) == (VOCAB + 1, VOCAB)
    close(model.eval()(ids()).logits, bidirectional(original.half().float()))


def test_a_head_of_its_own_stays_its_own(tmp_path: Path) -> None:
    original = causal_lm("gpt2", tie_word_embeddings=False).half().float()
    model, _ = load(write(tmp_path / "diffugpt-s", original, wrapper_tensors(original, head=True)), dtype=torch.float32)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    close(model.eval()(ids()).logits, bidirectional(original))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_save_wrapped_writes_load_reads(tmp_path: Path, family: str) -> None:
    original = causal_lm(family)
    save_wrapped(original, tmp_path / "model", word_tokenizer())
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert names == GPT2_NAMES if family == "gpt2" else "denoise_model.layers.1.mlp.up_proj.weight" in names
    model, _ = load(tmp_path / "model", convention="diffugpt-s")
    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], p) for name, p in original.state_dict().items())


# --- plain LLaMA and its adapter --------------------------------------------------------------------------------------


def test_diffullama_is_plain_llama(tmp_path: Path) -> None:
    original = causal_lm("llama")
    original.bfloat16().save_pretrained(tmp_path / "diffullama")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "diffullama", dtype=torch.float32)
    word_tokenizer().save_pretrained(tmp_path / "diffullama")
    model, _ = load(tmp_path / "diffullama", dtype=torch.float32)
    assert DiffusionConfig.of(model) == DiffusionConfig(11, shift=True)
    close(model.eval()(ids()).logits, bidirectional(original))
    model.save_pretrained(tmp_path / "again")  # our own layout: plain transformers reads it
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert DiffusionConfig.of(plain) == DiffusionConfig.of(model)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def adapter(folder: Path, base: Path, rename: Callable[[str], str] = str) -> PreTrainedModel:
    """A trained LoRA adapter with whole embeddings beside it, saved by peft under ``folder``; returns both as one."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(load(base)[0], config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    return model


def wrapped_name(name: str) -> str:
    """Of an adapter that was trained on the wrapper of the released code."""
    name = name.replace("base_model.model.model.embed_tokens.", "base_model.model.embed_tokens.")
    return name.replace("base_model.model.model.", "base_model.model.denoise_model.")


@pytest.fixture
def diffullama(tmp_path: Path) -> Path:
    causal_lm("llama").save_pretrained(tmp_path / "diffullama")
    word_tokenizer().save_pretrained(tmp_path / "diffullama")
    return tmp_path / "diffullama"


@pytest.mark.parametrize("rename", [str, wrapped_name], ids=["plain", "wrapped"])
def test_the_adapter_diffullama_gsm(tmp_path: Path, diffullama: Path, rename: Callable[[str], str]) -> None:
    expected = adapter(tmp_path / "diffullama-gsm", diffullama, rename).eval()(ids()).logits
    model, _ = load(tmp_path / "diffullama-gsm")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert DiffusionConfig.of(model).mask_id == 11
    close(model.eval()(ids()).logits, expected)
    assert (expected - load(diffullama)[0].eval()(ids()).logits).abs().max() > 0.1
    trainable, _ = load(tmp_path / "diffullama-gsm", base=diffullama, merge=False)
    close(trainable.eval()(ids()).logits, expected)
    assert any(p.requires_grad for p in trainable.parameters())


# --- what is not those weights ----------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict], dict]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("denoise_model.h.1.ln_2.bias"), r"missing weights: transformer\.h\.1\.ln_2\.bias"),
        (lambda t: t | {"denoise_model.h.2.ln_1.bias": torch.ones(3)}, r"unexpected weights: .*h\.2\.ln_1\.bias"),
        (lambda t: t | {"time_embedding.weight": torch.ones(3)}, r"unexpected weights: time_embedding\.weight"),
        (lambda t: t | {"denoise_model.ln_f.bias": torch.ones(3)}, r"mismatched weights: transformer\.ln_f\.bias"),
    ],
    ids=["missing", "a layer more", "foreign", "another shape"],
)
def test_other_weights_fail_loudly(tmp_path: Path, change: Callable, message: str) -> None:
    original = causal_lm("gpt2")
    folder = write(tmp_path / "diffugpt-s", original, change(wrapper_tensors(original)))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_missing_weights_of_a_plain_model_fail_loudly(tmp_path: Path, diffullama: Path) -> None:
    path = diffullama / "model.safetensors"
    save_file(without("model.layers.0.mlp.up_proj.weight")(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing weights: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_causal_lm(diffullama)


def test_a_torn_file_is_refused(tmp_path: Path, diffullama: Path) -> None:
    path = diffullama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is torn or no safetensors file"):
        load(diffullama)


def test_an_adapter_that_lacks_weights_fails_loudly(tmp_path: Path, diffullama: Path) -> None:
    adapter(tmp_path / "lora", diffullama)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "layers.1.self_attn.q_proj.lora_A" not in name}, path)
    with pytest.raises(ValueError, match=r"missing weights: .*layers\.1\.self_attn\.q_proj\.lora_A"):
        load(tmp_path / "lora")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no adapter_model\.safetensors"):
        load(tmp_path / "lora")


def test_a_vocabulary_smaller_than_the_mask_id(tmp_path: Path, diffullama: Path) -> None:
    with pytest.raises(ValueError, match=r"mask_token must be in \[0, 60\], got 126336"):
        load(diffullama, convention="llada")
    config = json.loads((diffullama / "config.json").read_text())
    config |= {"is_causal": False, "mask_token_id": 70, "diffusion": {"shift": True, "anneal_steps": 0}}
    (diffullama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mask_token_id must be in the vocabulary of 61 tokens, got 70"):
        load(diffullama)


def test_conventions_are_named(diffullama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="convention must be one of 'diffugpt-s'"):
        load(diffullama, convention="gpt")
    monkeypatch.undo()
    assert {name: (known.mask_id, known.shift) for name, known in CONVENTIONS.items()} == {
        "diffugpt-s": (10541, True),
        "diffugpt-m": (50257, True),
        "diffullama": (811, True),
        "llada": (126336, False),
        "dream": (151666, True),
    }
