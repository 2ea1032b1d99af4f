# SPDX-License-Identifier: Apache-2.0
"""Running commands, and models on disk to run them on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner, Result

from diffullama_ext.cli.main import app
from diffullama_ext.data import train_tokenizer
from diffullama_ext.integrations import adapt, load_causal_lm

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Counter:\n    n = 0\n" * 40

Run = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFULLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def run() -> Run:
    """Call the command line in this process."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def fails(run) -> Callable[..., None]:
    """Call it, and require this exit code and one line on stderr that holds each of these texts."""

    def check(code: int, texts: tuple[str, ...], *arguments: object) -> None:
        result = run(*arguments)
        assert result.exit_code == code, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("diffullama: ")
        for text in texts:
            assert text in lines[0]
        assert result.stdout == ""

    return check


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folders: gpt2, an autoregressive model; bert, t5: not causal language models; weights: no config."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([TEXT], 300, max_length=32)
    torch.manual_seed(0)
    size = len(tokenizer)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    gpt2 = GPT2Config(vocab_size=size, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    saved = {
        "gpt2": GPT2LMHeadModel(gpt2),
        "bert": BertModel(BertConfig(vocab_size=size, **shape)),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=size, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        ),
    }
    for name, model in saved.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "weights").mkdir()
    (root / "weights" / "model.safetensors").write_bytes(b"none")
    return root


@pytest.fixture(scope="session")
def adapted_model(models, tmp_path_factory) -> Path:
    """gpt2 made a diffusion model, not trained; it takes 32 tokens."""
    model, tokenizer = load_causal_lm(models / "gpt2")
    adapt(model, tokenizer)
    out = tmp_path_factory.mktemp("adapted-model")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
