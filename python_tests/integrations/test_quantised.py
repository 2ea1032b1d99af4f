# SPDX-License-Identifier: Apache-2.0
"""Models that transformers quantises (bitsandbytes, torchao): their linears stay, LoRA trains around them.

`make test-extras` runs these; without the packages they are skipped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MASK_ID, VOCAB, causal_lm, word_tokenizer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig, TrainingArguments

from diffullama_ext.integrations import adapt, add_lora, load
from diffullama_ext.objective import DiffusionObjective, ObjectiveConfig
from diffullama_ext.training import DiffusionTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # bitsandbytes computes in float16, torchao warns of libraries for GPUs that it does not load
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
]
x0 = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))


def bitsandbytes(bits: int) -> Callable[..., Any]:
    def config(skip: list[str] | None = None) -> Any:
        pytest.importorskip("bitsandbytes")
        kind = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        return BitsAndBytesConfig(**kind, llm_int8_skip_modules=skip)

    return config


def torchao(skip: list[str] | None = None) -> Any:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skip)


QUANTISERS = {"bitsandbytes 8 bit": bitsandbytes(8), "bitsandbytes 4 bit": bitsandbytes(4), "torchao 8 bit": torchao}


def loss_of(model: nn.Module) -> Tensor:
    return DiffusionObjective(ObjectiveConfig(MASK_ID))(model, x0, seed=1).loss


def saved(folder: Path, family: str = "llama") -> float:
    """An adapted model in ``folder``, and its loss before it is quantised."""
    width = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}
    model = adapt(causal_lm(family, **width), mask_token=MASK_ID)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return loss_of(model).item()


def stored(weight: Any) -> list[Tensor]:
    """The numbers that a quantised weight consists of."""
    if hasattr(weight, "qdata"):  # torchao
        return [weight.qdata.clone(), weight.scale.clone()]
    return [weight.data.clone()]


def quantised(model: PreTrainedModel) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if hasattr(p, "qdata") or not p.is_floating_point()}


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_lora_trains_around_linears_that_stay_quantised(tmp_path: Path, quantiser: str) -> None:
    exact = saved(tmp_path / "m")
    base, _ = load(tmp_path / "m", quantization_config=QUANTISERS[quantiser]())
    linears = quantised(base)
    assert len(linears) == 2 * 7  # every linear layer but the head
    assert loss_of(base).item() == pytest.approx(exact, rel=0.1)
    assert loss_of(base).item() != pytest.approx(exact, rel=1e-6)  # of the quantised numbers indeed

    before = {name: (weight, stored(weight)) for name, weight in linears.items()}
    model = add_lora(base, rank=2).train()
    first = loss_of(model)
    first.backward()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len([n for n in adapters if "lora_" in n]) == 2 * 2 * 7
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.values())
    assert all(p.grad.any() for n, p in adapters.items() if "lora_A" not in n)  # B begins at 0, so A has none yet
    optimiser = torch.optim.AdamW(adapters.values(), lr=0.02)
    for _ in range(5):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    assert loss_of(model.eval()).item() < first.item() - 0.5
    after = quantised(model.get_base_model())
    assert len(after) == len(before)
    for (weight, numbers), now in zip(before.values(), after.values(), strict=True):
        assert type(now) is type(weight)
        assert all(torch.equal(a, b) for a, b in zip(numbers, stored(now), strict=True))


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_the_trainer_takes_a_quantised_model_with_adapters(tmp_path: Path, quantiser: str) -> None:
    saved(tmp_path / "m")
    base, _ = load(tmp_path / "m", quantization_config=QUANTISERS[quantiser]())
    data = [{"input_ids": [word] * 12} for word in range(10, 26)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=1,
        save_steps=20,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = DiffusionTrainer(add_lora(base, rank=4), arguments, train_dataset=data)
    trainer.train()
    nll = [entry["masked_nll"] for entry in trainer.state.log_history if "masked_nll" in entry]
    assert sum(nll[-5:]) < 0.7 * sum(nll[:5])
    again, _ = load(
        tmp_path / "run" / "checkpoint-20",
        base=tmp_path / "m",
        merge=False,
        quantization_config=QUANTISERS[quantiser](),
    )
    assert loss_of(again.eval()).item() == pytest.approx(loss_of(trainer.model.eval()).item(), rel=1e-4)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_quantised_head_is_refused_by_name(tmp_path: Path, quantiser: str) -> None:
    saved(tmp_path)
    model, _ = load(tmp_path, quantization_config=QUANTISERS[quantiser](["model.norm"]))  # so not the head
    with pytest.raises(
        ValueError, match=r"the head's weight must be whole floating point numbers \[V, H\], got Int8|Params4"
    ):
        loss_of(model)
