# SPDX-License-Identifier: Apache-2.0
"""What adapt, prepare and load do to config, tokenizer and embeddings, and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, MASK_ID, VOCAB, causal_lm, word_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from diffullama_ext import AttentionMask
from diffullama_ext.integrations import DiffusionConfig, adapt, load, load_causal_lm, prepare, register_attention

LENGTH = 13


def ids(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --- what adapt does to config, tokenizer and embeddings ------------------------------------------------------------


def test_the_config_says_what_the_model_is(tmp_path: Path) -> None:
    model = adapt(causal_lm("gpt2"), mask_token=MASK_ID, shift=False, anneal_steps=9)
    assert DiffusionConfig.of(model) == DiffusionConfig(mask_id=MASK_ID, shift=False, anneal_steps=9)
    model.save_pretrained(tmp_path)  # the generation config too
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert DiffusionConfig.of(plain) == DiffusionConfig.of(model)
    assert type(plain) is type(model)
    assert plain.config.use_cache is False
    assert plain.generation_config.use_cache is False
    assert plain.config.attn_pdrop == 0.0


def test_only_what_is_new_changes(family: str) -> None:
    before = causal_lm(family).state_dict()
    after = adapt(causal_lm(family), word_tokenizer(mask_token="w5")).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_new_mask_token_gets_the_mean_embedding(tie: bool, tmp_path: Path) -> None:
    model, tokenizer = causal_lm("llama", tie_word_embeddings=tie), word_tokenizer()
    old = [e.weight.detach().clone() for e in (model.get_input_embeddings(), model.get_output_embeddings())]
    adapt(model, tokenizer)
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.mask_token_id == DiffusionConfig.of(model).mask_id == VOCAB
    for rows, now in zip(old, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        torch.testing.assert_close(now.weight[VOCAB], rows.mean(dim=0))
        assert torch.equal(now.weight[:VOCAB], rows)
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert tied is tie
    assert model(torch.tensor([[0, VOCAB]])).logits.shape == (1, 2, VOCAB + 1)

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer = load(tmp_path)
    assert tokenizer.mask_token_id == DiffusionConfig.of(again).mask_id
    assert tokenizer("w0 <|mask|> w1").input_ids == [2, VOCAB, 3]
    x = torch.randint(VOCAB + 1, (2, LENGTH))
    assert torch.equal(again.eval()(x).logits, model(x).logits)
    assert again.config._attn_implementation == "diffullama"


def test_a_padded_vocabulary_is_not_resized() -> None:
    model = causal_lm("llama", vocab_size=VOCAB + 3)
    rows = model.get_input_embeddings().weight.detach().clone()
    adapt(model, word_tokenizer())
    assert model.config.mask_token_id == VOCAB
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 3
    torch.testing.assert_close(model.get_input_embeddings().weight[VOCAB], rows[:VOCAB].mean(dim=0))
    assert torch.equal(model.get_input_embeddings().weight[VOCAB + 1 :], rows[VOCAB + 1 :])


def test_a_tokenizer_may_know_more_tokens_than_the_model() -> None:
    model = causal_lm("llama", vocab_size=VOCAB - 4)
    rows = model.get_input_embeddings().weight.detach().clone()
    adapt(model, word_tokenizer(mask_token="w58"))
    assert model.config.mask_token_id == VOCAB - 1
    torch.testing.assert_close(model.get_input_embeddings().weight[VOCAB - 1], rows.mean(dim=0))


@pytest.mark.parametrize(
    ("special", "mask_token", "expected"),
    [
        ({"mask_token": "w9"}, None, 11),
        ({"mask_token": "w9"}, "w3", 5),
        ({}, "w3", 5),
        ({}, "[MASK]", VOCAB),
        ({"mask_token": "w9"}, 4, 4),
        ({}, 0, 0),
    ],
    ids=["the tokenizer's", "another token", "existing token", "new token", "id, not the tokenizer's", "id 0"],
)
def test_the_mask_token_is_the_one_asked_for(special: dict, mask_token: str | int | None, expected: int) -> None:
    tokenizer = word_tokenizer(**special)
    before = tokenizer.mask_token
    model = adapt(causal_lm("qwen3"), tokenizer, mask_token=mask_token)
    assert DiffusionConfig.of(model).mask_id == expected
    assert model.get_input_embeddings().weight.shape[0] == max(VOCAB, expected + 1)
    if isinstance(mask_token, int):
        assert tokenizer.mask_token == before
    else:
        assert tokenizer.mask_token_id == expected


def test_adapting_again_changes_the_settings() -> None:
    model = adapt(causal_lm("llama"), mask_token=MASK_ID, anneal_steps=5)
    adapt(model, mask_token=MASK_ID, anneal_steps=0)
    assert DiffusionConfig.of(model).anneal_steps == 0


@pytest.mark.parametrize(("family", "dropout"), [("gpt2", "attn_pdrop"), ("llama", "attention_dropout")])
def test_attention_dropout_is_switched_off(family: str, dropout: str) -> None:
    x = ids()
    model = causal_lm(family, **{dropout: 0.5}).train()
    register_attention()
    model.set_attn_implementation("diffullama")
    with pytest.raises(ValueError, match=r"attention dropout must be 0 with .*, got 0.5"):
        model(x)
    adapt(model, mask_token=MASK_ID)
    assert getattr(model.config, dropout) == 0.0
    assert torch.equal(model(x).logits, model.eval()(x).logits)


def test_a_sliding_window_is_switched_off_with_a_warning(tmp_path: Path) -> None:
    model = causal_lm("mistral", sliding_window=4)
    with pytest.warns(UserWarning, match=r"sliding_window=4 becomes None"):
        adapt(model, mask_token=MASK_ID)
    x = ids()
    model.save_pretrained(tmp_path)
    close(model(x).logits, AutoModelForCausalLM.from_pretrained(tmp_path).eval()(x).logits)
    close(model(x).logits, adapt(causal_lm("mistral"), mask_token=MASK_ID)(x).logits)


# --- errors ---------------------------------------------------------------------------------------------------------


def bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "must be a transformers PreTrainedModel, got Linear; adapt before"),
        (bert, ValueError, "causal language model .AutoModelForCausalLM., got BertForMaskedLM"),
        (t5, ValueError, "causal language model .AutoModelForCausalLM., got T5ForConditionalGeneration"),
        (lambda: causal_lm("gpt2").transformer, ValueError, "causal language model .*, got GPT2Model"),
        (
            lambda: causal_lm("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
            ValueError,
            "full attention, got sliding_attention in layer_types of Qwen2ForCausalLM",
        ),
        (bloom, ValueError, "BloomForCausalLM does not take its attention from transformers' AttentionInterface"),
    ],
    ids=["no transformers model", "masked LM", "encoder-decoder", "no head", "sliding layers", "own attention"],
)
def test_adapt_refuses_the_model(model: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapt(model(), mask_token=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"tokenizer must be given for mask_token=None"),
        ({"mask_token": "<m>"}, ValueError, r"tokenizer must be given for mask_token='<m>'"),
        ({"mask_token": VOCAB}, ValueError, rf"mask_token must be in \[0, {VOCAB - 1}\], got {VOCAB}"),
        ({"mask_token": -1}, ValueError, r"mask_token must be in .*, got -1"),
        ({"anneal_steps": 10.5}, TypeError, r"anneal_steps must be an int, got 10.5"),
        ({"mask_token": 1.5}, TypeError, r"mask_token must be None, a token or an id, got 1.5"),
        ({"mask_token": True}, TypeError, r"mask_token must be None, a token or an id, got True"),
        ({"mask_token": 3, "anneal_steps": -2}, ValueError, r"anneal_steps must be in .*, got -2"),
    ],
)
def test_adapt_refuses_the_argument_and_changes_nothing(arguments: dict, error: type[Exception], message: str) -> None:
    model = causal_lm("llama")
    config = model.config.to_dict()
    with pytest.raises(error, match=message):
        adapt(model, **arguments)
    assert model.config.to_dict() == config


def test_prepare_refuses_a_model_that_is_not_adapted() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is not adapted to diffusion: its config must have"):
        prepare(causal_lm("llama"))


def test_prepare_readies_what_plain_transformers_loaded(tmp_path: Path) -> None:
    adapt(causal_lm("qwen2"), mask_token=MASK_ID).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = ids()
    expected = plain(x).logits
    close(prepare(plain)(x).logits, expected)
    close(plain(x, diffusion_mask=AttentionMask.causal(LENGTH)).logits, causal_lm("qwen2")(x).logits)


def one_line(error: Exception) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as nowhere:
        load(tmp_path / "nowhere")
    assert one_line(nowhere.value) == f"no such directory: '{tmp_path / 'nowhere'}'"

    with pytest.raises((FileNotFoundError, ValueError)) as empty:
        load(tmp_path)
    assert str(tmp_path) in one_line(empty.value)

    causal_lm("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="no tokenizer at") as no_tokenizer:
        load_causal_lm(tmp_path / "model")
    one_line(no_tokenizer.value)

    causal_lm("gpt2").save_pretrained(tmp_path / "gpt2")  # transformers makes an empty tokenizer for it
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*: it has no vocabulary"):
        load_causal_lm(tmp_path / "gpt2")
    with pytest.raises(FileNotFoundError, match=r"config\.json' is a file; give the folder"):
        load_causal_lm(tmp_path / "gpt2" / "config.json")

    word_tokenizer().save_pretrained(tmp_path / "model")
    assert load_causal_lm(tmp_path / "model")[0].config.vocab_size == VOCAB
    with pytest.raises(ValueError, match="is not adapted to diffusion") as not_adapted:
        load(tmp_path / "model")
    one_line(not_adapted.value)

    t5().save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5' is not a causal language model") as not_causal:
        load(tmp_path / "t5")
    one_line(not_causal.value)
