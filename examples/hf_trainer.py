# SPDX-License-Identifier: Apache-2.0
"""transformers.Trainer as it is: the data collator adds the noise, compute_loss_func weighs the masked tokens.

The model's own forward makes the logits [B, L, V]; DiffusionTrainer never holds them, and anneals the attention.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from diffullama_ext import mask_tokens, shifted_cross_entropy
from diffullama_ext.integrations import adapt
from diffullama_ext.objective import draw_t

MASK_ID, LENGTH, STRATA = 64, 32, 16


class Noising:
    """A batch of clean tokens becomes noised inputs and ``labels`` [B, 2, L]: the clean tokens, their weights."""

    def __init__(self, seed: int) -> None:
        self.seed, self.n_seen = seed, 0

    def __call__(self, examples: list[dict]) -> dict:
        x0 = torch.stack([torch.as_tensor(example["input_ids"]) for example in examples])
        number = torch.arange(self.n_seen, self.n_seen + len(x0))
        self.n_seen += len(x0)
        t = draw_t(number, self.seed, strata=STRATA)
        noised = mask_tokens(x0, t, mask_id=MASK_ID, seed=self.seed, sample_index=number)
        return {"input_ids": noised.xt, "labels": torch.stack([x0.float(), noised.masked / t[:, None]], dim=1)}


def diffusion_loss(outputs, labels, num_items_in_batch) -> torch.Tensor:
    """Trainer counts the entries of ``labels`` over accumulation and processes: two a token."""
    x0, weight = labels[:, 0].long(), labels[:, 1].contiguous()
    loss, _ = shifted_cross_entropy(
        outputs.logits, x0, weight > 0, loss_weight=weight, normalizer=num_items_in_batch / 2
    )
    return loss


def main(steps: int = 40, batch: int = 16, output_dir: str = "/tmp/diffullama-hf-trainer") -> list[float]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=MASK_ID + 1, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0
    )
    model = adapt(GPT2LMHeadModel(config), mask_token=MASK_ID)
    data = [{"input_ids": torch.full((LENGTH,), word)} for word in range(MASK_ID)]
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=16 // batch,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model, arguments, train_dataset=data, data_collator=Noising(seed=0), compute_loss_func=diffusion_loss
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print([round(loss, 2) for loss in main()])
